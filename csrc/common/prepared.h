// A penalty that is kept from step to step: what depends on shapes alone is checked and planned
// once, so that a step passes the gradients and nothing else.
//
// A backend derives its own class, builds its plan in the constructor, and registers
//
//   int64_t prepare_gram_penalty(std::vector<Tensor> weights, std::vector<Tensor> biases,
//                                std::vector<Tensor> pruned, std::vector<Tensor> targets,
//                                std::vector<int64_t> groups, std::vector<int64_t> columns,
//                                std::vector<double> offsets, std::string penalty,
//                                std::string precision) {
//     return keep_prepared(std::make_unique<PreparedHere>(Prepared::Arguments{
//         weights, biases, groups, columns, {penalty, offsets, pruned, targets}, precision}));
//   }
//
// for its dispatch key. The other two operators are the same for every backend (prepared.cpp).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "entrywise.h"
#include "layers.h"

namespace orthoreg {

// Keeps its tensors alive, though not where they lie: one that gets other memory (through .data) of
// the same shape, order, type and device is followed.
class Prepared {
 public:
  struct Arguments {
    std::vector<Tensor> weights, biases;
    std::vector<int64_t> groups, columns;
    PenaltyArguments of;
    std::string precision;
  };

  explicit Prepared(Arguments arguments)
      : arguments_(std::move(arguments)),
        layers_(read_layers(arguments_.weights, arguments_.biases, arguments_.groups,
                            arguments_.columns, arguments_.of)),
        gradients_(layers_.size()) {
    read_precision(arguments_.precision);
    for (const auto* list :
         {&arguments_.weights, &arguments_.biases, &arguments_.of.pruned, &arguments_.of.targets}) {
      for (const Tensor& tensor : *list) forms_.emplace_back(tensor);
    }
  }
  virtual ~Prepared() = default;

  // grads: of the weights, then of those biases that are not empty. Returns the values [L]; or,
  // with nothing written, an empty tensor where a kept tensor is no longer what it was, or a
  // gradient is not in the memory order and type of its tensor.
  Tensor add(const std::vector<Tensor>& grads, const Tensor& coefficients) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    if (!refresh(grads)) return torch::stable::new_empty(coefficients, {0});
    check_coefficients(coefficients, arguments_.weights);
    return add_to(gradients_, coefficients);
  }

 protected:
  // Adds the gradient of sum_l coefficients_l P_l, and returns the P_l. layers() and gradients hold
  // this step's pointers, gradients its strides too; nothing else of the layers has changed since
  // the constructor. The coefficients are checked.
  virtual Tensor add_to(const std::vector<Gradient>& gradients, const Tensor& coefficients) = 0;

  const std::vector<Layer>& layers() const { return layers_; }
  const Arguments& arguments() const { return arguments_; }

 private:
  // What a plan depends on, of one tensor. A gradient may have another stride from filter to
  // filter.
  struct Form {
    explicit Form(const Tensor& t)
        : type(t.scalar_type()),
          device(t.get_device_index()),
          cpu(t.is_cpu()),
          sizes(t.sizes().begin(), t.sizes().end()),
          strides(t.strides().begin(), t.strides().end()) {}

    bool fits(const Tensor& t, bool is_gradient = false) const {
      int32_t layout = 0;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
      if (layout != aoti_torch_layout_strided() || t.scalar_type() != type || t.is_cpu() != cpu ||
          t.get_device_index() != device) {
        return false;
      }
      const auto now = t.sizes(), steps = t.strides();
      if (now.size() != sizes.size()) return false;
      int64_t entries = 1;
      for (size_t d = 0; d < sizes.size(); ++d) {
        if (now[d] != sizes[d]) return false;
        const bool free = sizes[d] <= 1 || (is_gradient && d == 0);
        if (!free && steps[d] != strides[d]) return false;
        if (d > 0) entries *= sizes[d];
      }
      return !is_gradient || sizes[0] <= 1 || steps[0] >= entries;  // filters do not overlap
    }

    ScalarType type;
    int32_t device;
    bool cpu;
    std::vector<int64_t> sizes, strides;
  };

  bool refresh(const std::vector<Tensor>& grads) {
    const std::vector<Tensor>&weights = arguments_.weights, &biases = arguments_.biases;
    const size_t count = weights.size();
    size_t next = count;  // gradient of a bias
    for (size_t i = 0; i < count; ++i) {
      const Form &weight = forms_[i], &bias = forms_[count + i];
      if (i >= grads.size() || !weight.fits(weights[i]) || !weight.fits(grads[i], true))
        return false;
      layers_[i].weight = weights[i].const_data_ptr();
      gradients_[i] = {grads[i].mutable_data_ptr(), nullptr, grads[i].stride(0)};
      if (layers_[i].bias != nullptr) {
        if (next >= grads.size() || !bias.fits(biases[i]) || !bias.fits(grads[next])) return false;
        layers_[i].bias = biases[i].const_data_ptr();
        gradients_[i].bias = grads[next++].mutable_data_ptr();
      }
      size_t form = 2 * count + i;  // of a mask, then of targets
      if (const std::vector<Tensor>& masks = arguments_.of.pruned; !masks.empty()) {
        if (!forms_[form].fits(masks[i])) return false;
        const auto data = static_cast<const uint8_t*>(masks[i].const_data_ptr());
        if (layers_[i].pruned != nullptr) layers_[i].pruned = data;
        if (layers_[i].marked != nullptr) layers_[i].marked = data;
        form += count;
      }
      if (layers_[i].targets != nullptr) {
        if (!forms_[form].fits(arguments_.of.targets[i])) return false;
        layers_[i].targets = arguments_.of.targets[i].const_data_ptr();
      }
    }
    STD_TORCH_CHECK(next == grads.size(), "expected ", next, " gradients, got ", grads.size());
    return true;
  }

  const Arguments arguments_;
  std::vector<Layer> layers_;
  std::vector<Gradient> gradients_;
  std::vector<Form> forms_;  // of the weights, the biases, the masks, the targets
  std::mutex mutex_;
};

// Takes a prepared penalty into this library's registry, until release_prepared of the number that
// is returned.
int64_t keep_prepared(std::unique_ptr<Prepared> prepared);

}  // namespace orthoreg
