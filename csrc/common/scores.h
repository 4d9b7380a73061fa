// The filter scores, for the CPU and the CUDA launchers: names, and where each layer's entries lie.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "layers.h"
#include "score_plan.h"

namespace orthoreg {

enum class Criterion : int { kL1, kL2, kTaylor, kTaylorSq, kTaylorAbs, kFisher, kFisherDiag };
constexpr int kMaxCriteria = 7;

inline Criterion parse_criterion(const std::string& name) {
  const char* names[kMaxCriteria] = {"l1",         "l2",     "taylor",     "taylor_sq",
                                     "taylor_abs", "fisher", "fisher_diag"};
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
  void* fisher;                  // in the computing precision; null where none is accumulated
  const void *bias, *bias_grad;  // null without
  ScalarType dtype;
  int64_t groups, n, k;
  int64_t stride, grad_stride, fisher_stride;  // from one filter to the next
  int64_t inputs, taps, input_stride, tap_stride;
  int64_t first;         // where its filters' scores start in each row of the output
  int64_t first_inputs;  // where its input channels' scores start

  int64_t rows() const { return groups * n; }
  // Column j belongs to input channel j % inputs (channels last), else to j / taps.
  bool channels_last() const { return taps > 1 && inputs > 1 && input_stride == 1; }
};

// The dimensions that are scored: 0 the filters, 1 the input channels, 2 both, the filters of all
// layers before all input channels.
inline bool scores_rows(int64_t dim) { return dim != 1; }
inline bool scores_columns(int64_t dim) { return dim != 0; }

// What an operator of this family works on.
struct ScoreTask {
  std::vector<ScoreLayer> layers;
  std::vector<Criterion> criteria;
  int64_t dim;
  bool with_grads, with_fisher;
  int64_t total;  // scores a criterion
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

inline const void* read_score_grad(const Tensor& grad, const Tensor& weight, size_t i) {
  check_tensor(grad, weight, "grads", i);
  STD_TORCH_CHECK(grad.scalar_type() == weight.scalar_type() && same_entry_order(grad, weight),
                  "grads[", i, "] must have the shape, type and memory order of weights[", i, "]");
  return grad.const_data_ptr();
}

// biases: empty, or one for each weight; bias_grads likewise. fisher: empty, or one accumulator in
// the computing precision for each weight, in its memory order. Everything is checked before
// anything is written.
inline ScoreTask read_scores(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                             const std::vector<Tensor>& biases,
                             const std::vector<Tensor>& bias_grads,
                             const std::vector<Tensor>& fisher, const std::vector<int64_t>& groups,
                             int64_t dim, const std::vector<std::string>& names) {
  if (biases.empty() && !weights.empty()) {
    const std::vector<Tensor> none(weights.size(), torch::stable::new_empty(weights[0], {0}));
    return read_scores(weights, grads, none, none, fisher, groups, dim, names);
  }
  const std::vector<Layer> layers = read_layers(weights, biases, groups);
  STD_TORCH_CHECK(dim >= 0 && dim <= 2, "dim must be 0, 1 or 2 (both), got ", dim);
  STD_TORCH_CHECK(!names.empty() && names.size() <= kMaxCriteria, "expected 1 to ", kMaxCriteria,
                  " criteria, got ", names.size());
  STD_TORCH_CHECK(fisher.empty() || fisher.size() == weights.size(),
                  "expected one accumulator for each weight");
  ScoreTask task{{}, {}, dim, !fisher.empty(), !fisher.empty(), 0};
  task.layers.reserve(layers.size());
  for (const std::string& name : names) {
    task.criteria.push_back(parse_criterion(name));
    task.with_grads |= needs_grad(task.criteria.back());
    STD_TORCH_CHECK(task.criteria.back() != Criterion::kFisherDiag || !fisher.empty(),
                    "fisher_diag needs accumulators");
  }
  STD_TORCH_CHECK(
      !task.with_grads || (grads.size() == weights.size() && bias_grads.size() == weights.size()),
      "these criteria need one gradient for each weight and bias");
  for (size_t i = 0; i < layers.size(); ++i) {
    const Tensor& w = weights[i];
    const Layer& layer = layers[i];
    ScoreLayer s{};
    s.weight = layer.weight;
    s.bias = layer.bias;
    s.dtype = layer.dtype;
    s.groups = layer.groups;
    s.n = layer.n;
    s.k = layer.k;
    s.stride = s.grad_stride = s.fisher_stride = layer.stride;
    s.inputs = s.taps = 1;
    if (task.with_grads) {
      s.grad = read_score_grad(grads[i], w, i);
      if (w.size(0) > 1) s.grad_stride = grads[i].stride(0);
      if (layer.bias != nullptr) {
        check_tensor(bias_grads[i], w, "bias_grads", i);
        STD_TORCH_CHECK(bias_grads[i].scalar_type() == w.scalar_type() &&
                            bias_grads[i].is_contiguous() &&
                            bias_grads[i].numel() == biases[i].numel(),
                        "bias_grads[", i, "] must be like biases[", i, "]");
        s.bias_grad = bias_grads[i].const_data_ptr();
      }
    }
    if (!fisher.empty()) {
      check_tensor(fisher[i], w, "fisher", i);
      STD_TORCH_CHECK(fisher[i].scalar_type() == compute_type(weights) &&
                          same_entry_order(fisher[i], w) &&
                          (w.size(0) <= 1 || fisher[i].stride(0) >= layer.k),
                      "fisher[", i, "] must have the shape and memory order of weights[", i,
                      "] and the computing precision");
      s.fisher = fisher[i].mutable_data_ptr();
      if (w.size(0) > 1) s.fisher_stride = fisher[i].stride(0);
    }
    if (w.dim() > 1) {
      s.inputs = w.size(1);
      s.input_stride = w.stride(1);
      STD_TORCH_CHECK(!scores_columns(dim) || taps_are_a_run(w, &s.taps, &s.tap_stride), "weights[",
                      i, "] must keep the dimensions of its kernel together in memory");
    }
    STD_TORCH_CHECK(scores_rows(dim) || layer.bias == nullptr,
                    "a bias has no place in input channel scores");
    task.layers.push_back(s);
  }
  for (ScoreLayer& s : task.layers) {
    s.first = task.total;
    if (scores_rows(dim)) task.total += s.rows();
  }
  for (ScoreLayer& s : task.layers) {
    s.first_inputs = task.total;
    if (scores_columns(dim)) task.total += s.groups * s.inputs;
  }
  return task;
}

// The task of accumulate_fisher_: without biases, and without an accumulator that is given twice.
inline ScoreTask read_fisher_scores(const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& grads,
                                    const std::vector<Tensor>& fisher,
                                    const std::vector<int64_t>& groups, int64_t dim,
                                    const std::vector<std::string>& names) {
  STD_TORCH_CHECK(!weights.empty() && fisher.size() == weights.size(),
                  "expected one accumulator for each weight, got ", fisher.size(), " for ",
                  weights.size());
  ScoreTask task = read_scores(weights, grads, {}, {}, fisher, groups, dim, names);
  for (size_t i = 0; i < task.layers.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      STD_TORCH_CHECK(
          task.layers[i].fisher == nullptr || task.layers[i].fisher != task.layers[j].fisher,
          "fisher[", i, "] and fisher[", j, "] are the same accumulator");
    }
  }
  return task;
}

}  // namespace orthoreg
