// The filter scores, for the CPU and the CUDA launchers: names, and where each layer's entries lie.
#pragma once

#include <string>
#include <vector>

#include "layers.h"

namespace orthoreg {

enum class Criterion : int { kL1, kL2, kTaylor, kTaylorSq, kTaylorAbs, kFisher };
constexpr int kMaxCriteria = 6;

inline Criterion parse_criterion(const std::string& name) {
  const char* names[kMaxCriteria] = {"l1", "l2", "taylor", "taylor_sq", "taylor_abs", "fisher"};
  for (int i = 0; i < kMaxCriteria; ++i) {
    if (name == names[i]) return static_cast<Criterion>(i);
  }
  STD_TORCH_CHECK(false, "no compiled criterion is named '", name, "'");
}

inline bool needs_grad(Criterion criterion) { return criterion > Criterion::kL2; }

// One layer: the entries of filter i (dim 0) are [0, k) from i * stride on, and its bias. Those of
// input channel c of a group (dim 1) are, for each of its n filters, `taps` entries tap_stride
// apart from c * input_stride on.
struct ScoreLayer {
  const void *weight, *grad;     // grad null where no criterion needs it
  const void *bias, *bias_grad;  // null without
  ScalarType dtype;
  int64_t groups, n, k;
  int64_t stride, grad_stride;  // from one filter to the next
  int64_t inputs, taps, input_stride, tap_stride;
  int64_t first;  // where its scores start in each row of the output

  int64_t scores(int64_t dim) const { return groups * (dim == 0 ? n : inputs); }
};

// The kernel dimensions [2, ...) of a weight as one run of taps, if they are one.
inline bool taps_are_a_run(const Tensor& w, int64_t* taps, int64_t* stride) {
  *taps = 1;
  *stride = 0;
  for (int64_t d = w.dim() - 1; d >= 2; --d) {
    if (w.size(d) == 1) continue;
    if (*taps > 1 && w.stride(d) != *stride * *taps) return false;
    if (*taps == 1) *stride = w.stride(d);
    *taps *= w.size(d);
  }
  return true;
}

inline std::vector<ScoreLayer> read_score_layers(const std::vector<Tensor>& weights,
                                                 const std::vector<Tensor>& grads,
                                                 const std::vector<Tensor>& biases,
                                                 const std::vector<Tensor>& bias_grads,
                                                 const std::vector<int64_t>& groups, int64_t dim,
                                                 const std::vector<Criterion>& criteria) {
  const std::vector<Layer> layers = read_layers(weights, biases, groups);
  STD_TORCH_CHECK(dim == 0 || dim == 1, "dim must be 0 or 1, got ", dim);
  STD_TORCH_CHECK(!criteria.empty() && criteria.size() <= kMaxCriteria,
                  "expected 1 to 6 criteria, got ", criteria.size());
  bool with_grads = false;
  for (const Criterion criterion : criteria) with_grads |= needs_grad(criterion);
  STD_TORCH_CHECK(
      !with_grads || (grads.size() == weights.size() && bias_grads.size() == weights.size()),
      "these criteria need one gradient for each weight and bias");
  std::vector<ScoreLayer> out;
  int64_t first = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Tensor& w = weights[i];
    const Layer& layer = layers[i];
    ScoreLayer s{layer.weight,
                 nullptr,
                 layer.bias,
                 nullptr,
                 layer.dtype,
                 layer.groups,
                 layer.n,
                 layer.k,
                 layer.stride,
                 layer.stride,
                 1,
                 1,
                 0,
                 0,
                 first};
    if (with_grads) {
      const Tensor& g = grads[i];
      check_tensor(g, weights[0], "grads", i);
      STD_TORCH_CHECK(g.scalar_type() == w.scalar_type() && same_entry_order(g, w), "grads[", i,
                      "] must have the shape, type and memory order of weights[", i, "]");
      s.grad = g.const_data_ptr();
      if (g.size(0) > 1) s.grad_stride = g.stride(0);
      if (layer.bias != nullptr) {
        STD_TORCH_CHECK(bias_grads[i].scalar_type() == w.scalar_type() &&
                            bias_grads[i].is_contiguous() &&
                            bias_grads[i].numel() == biases[i].numel(),
                        "bias_grads[", i, "] must be like biases[", i, "]");
        s.bias_grad = bias_grads[i].const_data_ptr();
      }
    }
    if (w.dim() > 1) {
      s.inputs = w.size(1);
      s.input_stride = w.stride(1);
      STD_TORCH_CHECK(dim == 0 || taps_are_a_run(w, &s.taps, &s.tap_stride), "weights[", i,
                      "] must keep the dimensions of its kernel together in memory");
    }
    STD_TORCH_CHECK(dim == 0 || layer.bias == nullptr,
                    "a bias has no place in input channel scores");
    first += s.scores(dim);
    out.push_back(s);
  }
  return out;
}

}  // namespace orthoreg
