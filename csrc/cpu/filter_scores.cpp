// filter_scores on the CPU: all criteria from one pass over weight and gradient, summed in double.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "../common/scores.h"
#include "matrices.h"

namespace orthoreg::cpu {
namespace {

constexpr int64_t kChunk = 1024;        // entries gathered at once
constexpr int64_t kScoresAtATime = 16;  // scores of a unit

double score(Criterion criterion, const Sums& sums) {
  switch (criterion) {
    case Criterion::kL1:
      return sums.abs_w;
    case Criterion::kL2:
      return std::sqrt(sums.square_w);
    case Criterion::kTaylor:
      return std::fabs(sums.wg);
    case Criterion::kTaylorSq:
      return sums.square_wg;
    case Criterion::kTaylorAbs:
      return sums.abs_wg;
    case Criterion::kFisher:
      return sums.wg * sums.wg;
  }
  return 0;
}

// Collects scattered or narrow entries and sums them a chunk at a time.
template <class T>
class Gather {
 public:
  explicit Gather(bool with_grads) : w_(kChunk), g_(with_grads ? kChunk : 0) {}

  template <class E>
  void add(const E* w, const E* g, int64_t count, int64_t stride, Sums* sums) {
    for (int64_t i = 0; i < count; ++i) {
      w_[size_] = static_cast<T>(w[i * stride]);
      if (g != nullptr) g_[size_] = static_cast<T>(g[i * stride]);
      if (++size_ == kChunk) flush(sums);
    }
  }

  void flush(Sums* sums) {
    kernels<T>().sums(w_.data(), g_.empty() ? nullptr : g_.data(), size_, sums);
    size_ = 0;
  }

 private:
  std::vector<T> w_, g_;
  int64_t size_ = 0;
};

template <class T, class E>
Sums filter_sums(const ScoreLayer& layer, int64_t i, Gather<T>& gather) {
  Sums sums;
  const E* w = static_cast<const E*>(layer.weight) + i * layer.stride;
  const E* g = layer.grad ? static_cast<const E*>(layer.grad) + i * layer.grad_stride : nullptr;
  if constexpr (std::is_same_v<T, E>) {
    kernels<T>().sums(w, g, layer.k, &sums);
  } else {
    gather.add(w, g, layer.k, 1, &sums);
  }
  if (layer.bias != nullptr) {
    const E* bias_grad = layer.bias_grad ? static_cast<const E*>(layer.bias_grad) + i : nullptr;
    gather.add(static_cast<const E*>(layer.bias) + i, bias_grad, 1, 1, &sums);
  }
  gather.flush(&sums);
  return sums;
}

template <class T, class E>
Sums input_sums(const ScoreLayer& layer, int64_t input, Gather<T>& gather) {
  Sums sums;
  const int64_t group = input / layer.inputs, channel = input % layer.inputs;
  for (int64_t i = group * layer.n; i < (group + 1) * layer.n; ++i) {
    const int64_t start = channel * layer.input_stride;
    const E* w = static_cast<const E*>(layer.weight) + i * layer.stride + start;
    const E* g =
        layer.grad ? static_cast<const E*>(layer.grad) + i * layer.grad_stride + start : nullptr;
    gather.add(w, g, layer.taps, layer.tap_stride, &sums);
  }
  gather.flush(&sums);
  return sums;
}

template <class T>
void run(const std::vector<ScoreLayer>& layers, const std::vector<Criterion>& criteria, int64_t dim,
         T* out, int64_t total) {
  struct Unit {
    const ScoreLayer* layer;
    int64_t first;
  };
  std::vector<Unit> units;
  double work = 0;
  for (const ScoreLayer& layer : layers) {
    for (int64_t i = 0; i < layer.scores(dim); i += kScoresAtATime) units.push_back({&layer, i});
    work += static_cast<double>(layer.groups) * layer.n * layer.k;
  }
  const bool with_grads = layers[0].grad != nullptr;
  for_each_unit(
      static_cast<int64_t>(units.size()), work, [&] { return Gather<T>(with_grads); },
      [&](int64_t u, Gather<T>& gather) {
        const ScoreLayer& layer = *units[u].layer;
        const int64_t last = std::min(units[u].first + kScoresAtATime, layer.scores(dim));
        visit_type(layer.dtype, [&](auto element) {
          using E = decltype(element);
          for (int64_t i = units[u].first; i < last; ++i) {
            const Sums sums =
                dim == 0 ? filter_sums<T, E>(layer, i, gather) : input_sums<T, E>(layer, i, gather);
            for (size_t c = 0; c < criteria.size(); ++c) {
              out[c * total + layer.first + i] = static_cast<T>(score(criteria[c], sums));
            }
          }
        });
      });
}

Tensor filter_scores(std::vector<Tensor> weights, std::vector<Tensor> grads,
                     std::vector<Tensor> biases, std::vector<Tensor> bias_grads,
                     std::vector<int64_t> groups, int64_t dim, std::vector<std::string> names) {
  std::vector<Criterion> criteria;
  for (const std::string& name : names) criteria.push_back(parse_criterion(name));
  const std::vector<ScoreLayer> layers =
      read_score_layers(weights, grads, biases, bias_grads, groups, dim, criteria);
  const int64_t total = layers.back().first + layers.back().scores(dim);
  Tensor out = torch::stable::new_empty(weights[0], {static_cast<int64_t>(criteria.size()), total},
                                        compute_type(weights));
  if (is_double(weights)) {
    run(layers, criteria, dim, static_cast<double*>(out.mutable_data_ptr()), total);
  } else {
    run(layers, criteria, dim, static_cast<float*>(out.mutable_data_ptr()), total);
  }
  return out;
}

}  // namespace
}  // namespace orthoreg::cpu

STABLE_TORCH_LIBRARY_IMPL(orthoreg, CPU, m) {
  m.impl("filter_scores", TORCH_BOX(&orthoreg::cpu::filter_scores));
}
