#include "gram.cuh"
#include "launch.h"

namespace orthoreg::cuda {
namespace {

Tensor gram(std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<int64_t> groups,
            std::vector<int64_t> columns) {
  const std::vector<Layer> layers = read_layers(weights, biases, groups, columns);
  const DeviceScope scope(weights[0]);
  Tensor out = torch::stable::new_empty(weights[0], {slopes_size(layers)}, compute_type(weights));
  const cudaStream_t stream = current_stream(weights[0]);
  for_each_launch(layers, {}, gram_units, [&](const Problems& problems, int) {
    if (problems.units == 0) return;
    if (is_double(weights)) {
      gram_kernel<double, Plain>
          <<<problems.units, kThreads, 0, stream>>>(problems, data<double>(out), nullptr);
    } else {
      gram_kernel<float, Plain>
          <<<problems.units, kThreads, 0, stream>>>(problems, data<float>(out), nullptr);
    }
    ORTHOREG_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

}  // namespace
}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, ORTHOREG_CUDA_KEY, m) {
  m.impl("gram", TORCH_BOX(&orthoreg::cuda::gram));
}
