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
  // What a plan depends on, of one tensor. Asking torch is most of what a step costs on the host,
  // so everything is asked once, and the device only of memory that was not there in the last step.
  class Form {
   public:
    explicit Form(const Tensor& t)
        : device_(t.get_device_index()),
          cpu_(t.is_cpu()),
          sizes_(t.sizes().begin(), t.sizes().end()),
          strides_(t.strides().begin(), t.strides().end()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type_));
    }

    // Whether a tensor has this form, and if so where it lies.
    bool find(const Tensor& t, const void** data) {
      const int64_t* steps = nullptr;
      if (!has_form(t, /*first=*/0, &steps)) return false;
      *data = t.const_data_ptr();
      return is_on_device(t, *data, &seen_);
    }

    // The same of a gradient, which may have another step from filter to filter.
    bool find_gradient(const Tensor& t, void** data, int64_t* step) {
      const int64_t* steps = nullptr;
      if (!has_form(t, /*first=*/1, &steps)) return false;
      int64_t entries = 1;
      for (size_t d = 1; d < sizes_.size(); ++d) entries *= sizes_[d];
      *step = steps[0];
      if (sizes_[0] > 1 && *step < entries) return false;  // filters overlap
      *data = t.mutable_data_ptr();
      return is_on_device(t, *data, &seen_gradient_);
    }

   private:
    // first: the first dimension whose stride has to be the same.
    bool has_form(const Tensor& t, size_t first, const int64_t** steps) const {
      int32_t layout = 0, type = 0;
      int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
      if (layout != strided_ || type != type_ || dim != static_cast<int64_t>(sizes_.size())) {
        return false;
      }
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
      for (size_t d = 0; d < sizes_.size(); ++d) {
        if (sizes[d] != sizes_[d]) return false;
        if (d >= first && sizes_[d] > 1 && strides[d] != strides_[d]) return false;
      }
      *steps = strides;
      return true;
    }

    bool is_on_device(const Tensor& t, const void* data, const void** seen) const {
      if (data == *seen) return true;
      if (t.is_cpu() != cpu_ || t.get_device_index() != device_) return false;
      *seen = data;
      return true;
    }

    int32_t strided_ = aoti_torch_layout_strided(), type_ = 0, device_;
    bool cpu_;
    std::vector<int64_t> sizes_, strides_;
    const void *seen_ = nullptr, *seen_gradient_ = nullptr;
  };

  bool refresh(const std::vector<Tensor>& grads) {
    const std::vector<Tensor>&weights = arguments_.weights, &biases = arguments_.biases;
    const size_t count = weights.size();
    size_t next = count;  // gradient of a bias
    for (size_t i = 0; i < count; ++i) {
      Form &weight = forms_[i], &bias = forms_[count + i];
      Layer& layer = layers_[i];
      Gradient& gradient = gradients_[i];
      if (i >= grads.size() || !weight.find(weights[i], &layer.weight) ||
          !weight.find_gradient(grads[i], &gradient.weight, &gradient.stride)) {
        return false;
      }
      if (layer.bias != nullptr) {
        int64_t step = 0;
        if (next >= grads.size() || !bias.find(biases[i], &layer.bias) ||
            !bias.find_gradient(grads[next++], &gradient.bias, &step) || step != 1) {
          return false;
        }
      }
      size_t form = 2 * count + i;  // of a mask, then of targets
      if (const std::vector<Tensor>& masks = arguments_.of.pruned; !masks.empty()) {
        const void* mask = nullptr;
        if (!forms_[form].find(masks[i], &mask)) return false;
        if (layer.pruned != nullptr) layer.pruned = static_cast<const uint8_t*>(mask);
        if (layer.marked != nullptr) layer.marked = static_cast<const uint8_t*>(mask);
        form += count;
      }
      if (layer.targets != nullptr) {
        if (!forms_[form].find(arguments_.of.targets[i], &layer.targets)) return false;
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
