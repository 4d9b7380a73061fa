// From the tensors of an operator to plain data: what the CPU and the CUDA launchers share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "entrywise.h"
#include "precision.h"

namespace orthoreg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One weight [groups * n, ...], read as `groups` filter matrices [n, k], or [n, k + 1] with a bias.
struct Layer {
  const void* weight;
  const void* bias;       // null without one
  const uint8_t* pruned;  // null, or 1 for each filter that reads as zeros and has target 0
  const uint8_t* marked;  // null, or 1 for each filter that the penalty marks
  const void* targets;    // null, or what stands for 1 on the diagonal, in the computing precision
  ScalarType dtype;
  int64_t groups, n, k;
  int64_t stride;  // from one filter to the next, in elements
  bool columns;
  double offset;   // added to the value
  int64_t slopes;  // where the layer's [groups, m, m] starts in the flat buffer

  int64_t width() const { return k + (bias != nullptr); }
  int64_t m() const { return columns ? width() : n; }
  int64_t inner() const { return columns ? n : width(); }  // what a Gram entry sums over
  bool is_pruned(int64_t filter) const { return pruned != nullptr && pruned[filter] != 0; }
};

// What a penalty adds to the layers of a call; each list has an entry a layer or none at all.
struct PenaltyArguments {
  static constexpr const char* kNone = "(none)";

  std::string penalty = kNone;
  std::vector<double> offsets = {};
  std::vector<Tensor> pruned = {};   // bool [groups * n] each, or empty
  std::vector<Tensor> targets = {};  // [groups * n] each in the computing precision, or empty
};

inline Precision read_precision(const std::string& name) {
  Precision precision;
  STD_TORCH_CHECK(parse_precision(name, &precision), "no precision is named '", name, "'");
  return precision;
}

inline bool is_double(const std::vector<Tensor>& weights) {
  return weights[0].scalar_type() == ScalarType::Double;
}

inline ScalarType compute_type(const std::vector<Tensor>& weights) {
  return is_double(weights) ? ScalarType::Double : ScalarType::Float;
}

// Every filter is one gapless block, in whatever order of its dimensions.
inline bool has_dense_filters(const Tensor& weight) {
  if (weight.numel() == 0) return true;  // whatever its strides are
  int64_t expected = 1, entries = 1;
  for (int64_t d = 1; d < weight.dim(); ++d) entries *= weight.size(d);
  while (expected < entries) {
    const int64_t before = expected;
    for (int64_t d = 1; d < weight.dim(); ++d) {
      if (weight.size(d) > 1 && weight.stride(d) == expected) {
        expected *= weight.size(d);
        break;
      }
    }
    if (expected == before) return false;
  }
  return weight.dim() == 0 || weight.size(0) <= 1 || weight.stride(0) >= entries;
}

// Whether entry j of a filter is the same element in both, so that a gradient can be written in
// place.
inline bool same_entry_order(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
    if (d > 0 && a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

inline void check_tensor(const Tensor& t, const Tensor& first, const char* what, size_t i) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float ||
                      type == ScalarType::Half || type == ScalarType::BFloat16,
                  what, "[", i, "] must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK((type == ScalarType::Double) == (first.scalar_type() == ScalarType::Double), what,
                  "[", i, "]: float64 and smaller types cannot be mixed in one operator call");
  STD_TORCH_CHECK(t.get_device_index() == first.get_device_index() && t.is_cpu() == first.is_cpu(),
                  what, "[", i, "] is on another device than weights[0]");
}

inline std::vector<Layer> read_layers(const std::vector<Tensor>& weights,
                                      const std::vector<Tensor>& biases,
                                      const std::vector<int64_t>& groups,
                                      const std::vector<int64_t>& columns = {},
                                      const PenaltyArguments& of = {}) {
  const size_t count = weights.size();
  const std::vector<Tensor>&pruned = of.pruned, &targets = of.targets;
  const std::vector<double>& offsets = of.offsets;
  STD_TORCH_CHECK(of.penalty == of.kNone || Penalties::id(of.penalty) >= 0,
                  "no compiled penalty is named '", of.penalty, "'");
  const bool marks = Penalties::marks(of.penalty);
  STD_TORCH_CHECK(count > 0, "an operator needs at least one weight");
  STD_TORCH_CHECK(biases.size() == count && groups.size() == count, "expected ", count,
                  " biases and groups, got ", biases.size(), " and ", groups.size());
  STD_TORCH_CHECK(columns.empty() || columns.size() == count, "expected ", count, " columns, got ",
                  columns.size());
  STD_TORCH_CHECK(offsets.empty() || offsets.size() == count, "expected ", count, " offsets, got ",
                  offsets.size());
  STD_TORCH_CHECK(pruned.empty() || pruned.size() == count, "expected ", count, " masks, got ",
                  pruned.size());
  STD_TORCH_CHECK(targets.empty() || targets.size() == count, "expected ", count, " targets, got ",
                  targets.size());
  constexpr int64_t kMost = 1 << 30;  // kernels count in 32 bits
  std::vector<Layer> layers;
  layers.reserve(count);
  int64_t slopes = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &w = weights[i], &b = biases[i];
    check_tensor(w, weights[0], "weights", i);
    STD_TORCH_CHECK(w.dim() > 0, "weights[", i, "] must be [filters, ...]");
    STD_TORCH_CHECK(has_dense_filters(w), "weights[", i, "] must have dense filters");
    STD_TORCH_CHECK(w.size(0) < kMost && w.numel() / std::max<int64_t>(w.size(0), 1) < kMost,
                    "weights[", i, "] has a dimension of 2^30 or more");
    STD_TORCH_CHECK(groups[i] > 0 && w.size(0) % groups[i] == 0, "groups[", i, "] = ", groups[i],
                    " does not divide the ", w.size(0), " filters");
    const bool with_bias = b.numel() > 0;
    if (with_bias) {
      check_tensor(b, weights[0], "biases", i);
      STD_TORCH_CHECK(b.scalar_type() == w.scalar_type() && b.dim() == 1 && b.is_contiguous() &&
                          b.size(0) == w.size(0),
                      "biases[", i, "] must be a contiguous [", w.size(0),
                      "] of its weight's type");
    }
    const bool with_mask = !pruned.empty() && pruned[i].numel() > 0;
    if (with_mask) {
      const Tensor& mask = pruned[i];
      STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 1 &&
                          mask.is_contiguous() && mask.size(0) == w.size(0) &&
                          mask.is_cpu() == w.is_cpu() &&
                          mask.get_device_index() == w.get_device_index(),
                      "pruned[", i, "] must be a contiguous bool [", w.size(0),
                      "] on the device of its weight");
    }
    const bool with_targets = !targets.empty() && targets[i].numel() > 0;
    if (with_targets) {
      check_tensor(targets[i], weights[0], "targets", i);
      STD_TORCH_CHECK(targets[i].scalar_type() == compute_type(weights) && targets[i].dim() == 1 &&
                          targets[i].is_contiguous() && targets[i].size(0) == w.size(0),
                      "targets[", i, "] must be a contiguous [", w.size(0),
                      "] in the computing precision");
    }
    Layer layer{};
    // Not null without entries either: to kernels, a filter at no address is a pruned one.
    layer.weight = w.numel() > 0 ? w.const_data_ptr() : "";
    layer.bias = with_bias ? b.const_data_ptr() : nullptr;
    layer.dtype = w.scalar_type();
    layer.groups = groups[i];
    layer.n = w.size(0) / groups[i];
    layer.k = 1;
    for (int64_t d = 1; d < w.dim(); ++d) layer.k *= w.size(d);
    layer.stride = w.size(0) > 1 && w.numel() > 0 ? w.stride(0) : layer.k;
    layer.columns = !columns.empty() && columns[i] != 0;
    layer.offset = offsets.empty() ? 0.0 : offsets[i];
    layer.slopes = slopes;
    STD_TORCH_CHECK(!layer.columns || (!marks && !with_targets), "weights[", i,
                    "]: marks and targets belong to filters, and its columns are compared");
    if (with_mask) {
      (marks ? layer.marked : layer.pruned) =
          static_cast<const uint8_t*>(pruned[i].const_data_ptr());
    }
    if (with_targets) layer.targets = targets[i].const_data_ptr();
    slopes += layer.groups * layer.m() * layer.m();
    layers.push_back(layer);
  }
  return layers;
}

inline int64_t slopes_size(const std::vector<Layer>& layers) {
  const Layer& last = layers.back();
  return last.slopes + last.groups * last.m() * last.m();
}

// slopes: those that gram_penalty returned for these layers.
inline void check_slopes(const Tensor& slopes, const std::vector<Tensor>& weights,
                         const std::vector<Layer>& layers) {
  check_tensor(slopes, weights[0], "slopes", 0);
  STD_TORCH_CHECK(slopes.scalar_type() == compute_type(weights) && slopes.is_contiguous() &&
                      slopes.numel() == slopes_size(layers),
                  "slopes do not belong to these weights");
}

// coefficients: [L] in the computing precision.
inline void check_coefficients(const Tensor& coefficients, const std::vector<Tensor>& weights) {
  check_tensor(coefficients, weights[0], "coefficients", 0);
  STD_TORCH_CHECK(coefficients.scalar_type() == compute_type(weights) && coefficients.dim() == 1 &&
                      coefficients.numel() == static_cast<int64_t>(weights.size()) &&
                      coefficients.is_contiguous(),
                  "coefficients must be a contiguous [", weights.size(),
                  "] in the computing precision");
}

// Where one layer's gradient goes; strides may differ from the weight's, the entry order may not.
struct Gradient {
  void* weight;
  void* bias;  // null without one
  int64_t stride;
};

inline std::vector<Gradient> read_gradients(const std::vector<Tensor>& weights,
                                            const std::vector<Tensor>& biases,
                                            const std::vector<Tensor>& grads,
                                            const std::vector<Tensor>& bias_grads) {
  STD_TORCH_CHECK(grads.size() == weights.size() && bias_grads.size() == weights.size(),
                  "expected ", weights.size(), " grads and bias_grads, got ", grads.size(), " and ",
                  bias_grads.size());
  std::vector<Gradient> out;
  out.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor &w = weights[i], &g = grads[i];
    check_tensor(g, weights[0], "grads", i);
    STD_TORCH_CHECK(g.scalar_type() == w.scalar_type() && same_entry_order(g, w) &&
                        (g.size(0) <= 1 || g.stride(0) >= g.numel() / g.size(0)),
                    "grads[", i, "] must have the shape, type and memory order of weights[", i,
                    "], and filters that do not overlap");
    const bool with_bias = biases[i].numel() > 0;
    STD_TORCH_CHECK(!with_bias || (bias_grads[i].numel() == biases[i].numel() &&
                                   bias_grads[i].is_contiguous() &&
                                   bias_grads[i].scalar_type() == w.scalar_type()),
                    "bias_grads[", i, "] must be like biases[", i, "]");
    out.push_back({g.mutable_data_ptr(), with_bias ? bias_grads[i].mutable_data_ptr() : nullptr,
                   g.size(0) > 1 ? g.stride(0) : 0});
  }
  return out;
}

}  // namespace orthoreg
