// filter_scores: one launch for all criteria of all layers.
#include <memory>

#include "../common/scores.h"
#include "filter_scores.cuh"
#include "launch.h"

namespace orthoreg::cuda {
namespace {

static_assert(kMaxScoreCriteria == kMaxCriteria);

template <class T>
void run(const std::vector<ScoreLayer>& layers, const std::vector<Criterion>& criteria, int64_t dim,
         Tensor& out, int64_t total, cudaStream_t stream) {
  const auto problems = std::make_unique<ScoreProblems>();
  problems->criteria = static_cast<int32_t>(criteria.size());
  for (size_t c = 0; c < criteria.size(); ++c) {
    problems->criterion[c] = static_cast<int32_t>(criteria[c]);
  }
  for (size_t first = 0; first < layers.size(); first += kScoreLayersPerLaunch) {
    const size_t last = std::min(layers.size(), first + kScoreLayersPerLaunch);
    problems->count = static_cast<int32_t>(last - first);
    int64_t units = 0;
    for (size_t i = first; i < last; ++i) {
      const ScoreLayer& l = layers[i];
      problems->layer[i - first] = {l.weight,
                                    l.grad,
                                    l.bias,
                                    l.bias_grad,
                                    l.stride,
                                    l.grad_stride,
                                    l.input_stride,
                                    l.tap_stride,
                                    l.first,
                                    static_cast<int32_t>(l.n),
                                    static_cast<int32_t>(l.k),
                                    static_cast<int32_t>(l.inputs),
                                    static_cast<int32_t>(l.taps),
                                    static_cast<int32_t>(units),
                                    static_cast<int32_t>(l.scores(dim)),
                                    element_type(l.dtype)};
      units += (l.scores(dim) + kWarps - 1) / kWarps;
    }
    if (units == 0) continue;
    filter_scores_kernel<T><<<static_cast<unsigned>(units), kWarps * 32, 0, stream>>>(
        *problems, data<T>(out), total, static_cast<int>(dim));
    ORTHOREG_CUDA_CHECK(cudaGetLastError());
  }
}

Tensor filter_scores(std::vector<Tensor> weights, std::vector<Tensor> grads,
                     std::vector<Tensor> biases, std::vector<Tensor> bias_grads,
                     std::vector<int64_t> groups, int64_t dim, std::vector<std::string> names) {
  std::vector<Criterion> criteria;
  for (const std::string& name : names) criteria.push_back(parse_criterion(name));
  const std::vector<ScoreLayer> layers =
      read_score_layers(weights, grads, biases, bias_grads, groups, dim, criteria);
  const DeviceScope scope(weights[0]);
  const int64_t total = layers.back().first + layers.back().scores(dim);
  Tensor out = torch::stable::new_empty(weights[0], {static_cast<int64_t>(criteria.size()), total},
                                        compute_type(weights));
  const auto launch = is_double(weights) ? run<double> : run<float>;
  launch(layers, criteria, dim, out, total, current_stream(weights[0]));
  return out;
}

}  // namespace
}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, ORTHOREG_CUDA_KEY, m) {
  m.impl("filter_scores", TORCH_BOX(&orthoreg::cuda::filter_scores));
}
