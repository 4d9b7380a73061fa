// The only place that talks to the CUDA runtime and to torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../common/layers.h"
#include "../common/registration.h"

#define ORTHOREG_CUDA_CHECK(expr)                                                \
  do {                                                                           \
    const cudaError_t err_ = (expr);                                             \
    if (err_ != cudaSuccess) cudaGetLastError(); /* told now, not at the next */ \
    STD_TORCH_CHECK(err_ == cudaSuccess, #expr ": ", cudaGetErrorString(err_));  \
  } while (0)

namespace orthoreg::cuda {

// The stream torch runs on now; null in the emulator of the tests, whose tensors are on the CPU.
cudaStream_t current_stream(const Tensor& on);

// Makes the device of a tensor the current one for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& on) {
    if (!on.is_cpu()) guard_.emplace(on.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace orthoreg::cuda
