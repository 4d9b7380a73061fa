#include "runtime.h"

// Lives in libtorch_cuda.so. Weak, so that the module also loads beside a CPU-only torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) __attribute__((weak));

namespace orthoreg::cuda {

cudaStream_t current_stream(const Tensor& on) {
  if (on.is_cpu()) return nullptr;  // emulated
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA support");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

namespace {
bool torch_has_cuda() { return aoti_torch_get_current_cuda_stream != nullptr; }
}  // namespace

}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_FRAGMENT(ORTHOREG_NAMESPACE, m) { m.def("_torch_has_cuda() -> bool"); }
ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_torch_has_cuda", TORCH_BOX(&orthoreg::cuda::torch_has_cuda));
}
