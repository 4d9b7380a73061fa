// A torch operator on the stable ABI with an assertion in its kernel.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cassert>

namespace {

__global__ void roots_kernel(const float* x, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  assert(x[i] >= 0);
  out[i] = sqrtf(x[i]);
}

torch::stable::Tensor roots(const torch::stable::Tensor& x) {
  torch::stable::Tensor out = torch::stable::empty_like(x);
  const int n = static_cast<int>(x.numel());
  roots_kernel<<<(n + 63) / 64, 64>>>(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), n);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(emulator_test, m) { m.def("roots(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(emulator_test, CPU, m) { m.impl("roots", TORCH_BOX(&roots)); }
