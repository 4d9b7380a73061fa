// gram_penalty (2 launches), gram_penalty_grad (1) and add_gram_penalty_grad_ (3) for all layers.
#include <tuple>

#include "gram.cuh"
#include "gram_penalty.cuh"
#include "launch.h"

namespace orthoreg::cuda {
namespace {

template <class T>
void values_and_slopes(const std::vector<Layer>& layers, const std::string& penalty, Tensor& values,
                       Tensor& slopes, cudaStream_t stream) {
  const bool known = visit_penalty(penalty, [&](auto functor) {
    for_each_launch(layers, {}, gram_units, [&](const Problems& problems, int first) {
      Tensor parts = torch::stable::new_empty(values, {problems.units}, ScalarType::Double);
      if (problems.units > 0) {
        gram_kernel<T, decltype(functor)><<<problems.units, kThreads, 0, stream>>>(
            problems, data<T>(slopes), data<double>(parts));
        ORTHOREG_CUDA_CHECK(cudaGetLastError());
      }
      finish_penalty_kernel<T><<<problems.count, kThreads, 0, stream>>>(
          problems, data<double>(parts), data<T>(values) + first);
      ORTHOREG_CUDA_CHECK(cudaGetLastError());
    });
  });
  STD_TORCH_CHECK(known, "no compiled penalty is named '", penalty, "'");
}

template <class T, bool kAccumulate>
void gradients(const std::vector<Layer>& layers, const std::vector<Gradient>& grads,
               const Tensor& slopes, const Tensor& coefficients, cudaStream_t stream) {
  for_each_launch(layers, grads, grad_units, [&](const Problems& problems, int first) {
    if (problems.units == 0) return;
    gram_penalty_grad_kernel<T, kAccumulate><<<problems.units, kThreads, 0, stream>>>(
        problems, data<T>(slopes), data<T>(coefficients) + first);
    ORTHOREG_CUDA_CHECK(cudaGetLastError());
  });
}

std::tuple<Tensor, Tensor> gram_penalty(std::vector<Tensor> weights, std::vector<Tensor> biases,
                                        std::vector<int64_t> groups, std::vector<int64_t> columns,
                                        std::vector<double> offsets, std::string penalty) {
  const std::vector<Layer> layers = read_layers(weights, biases, groups, columns, offsets);
  const DeviceScope scope(weights[0]);
  const ScalarType type = compute_type(weights);
  const int64_t count = static_cast<int64_t>(layers.size());
  Tensor values = torch::stable::new_empty(weights[0], {count}, type);
  Tensor slopes = torch::stable::new_empty(weights[0], {slopes_size(layers)}, type);
  const auto run = is_double(weights) ? values_and_slopes<double> : values_and_slopes<float>;
  run(layers, penalty, values, slopes, current_stream(weights[0]));
  return {values, slopes};
}

std::vector<Tensor> gram_penalty_grad(std::vector<Tensor> weights, std::vector<Tensor> biases,
                                      Tensor slopes, Tensor coefficients,
                                      std::vector<int64_t> groups, std::vector<int64_t> columns,
                                      std::string) {
  const std::vector<Layer> layers = read_layers(weights, biases, groups, columns);
  check_coefficients(coefficients, weights);
  check_slopes(slopes, weights, layers);
  const DeviceScope scope(weights[0]);
  std::vector<Tensor> grads, bias_grads;
  for (const Tensor& w : weights) grads.push_back(torch::stable::empty_like(w));
  for (const Tensor& b : biases) bias_grads.push_back(torch::stable::empty_like(b));
  const auto run = is_double(weights) ? gradients<double, false> : gradients<float, false>;
  run(layers, read_gradients(weights, biases, grads, bias_grads), slopes, coefficients,
      current_stream(weights[0]));
  grads.insert(grads.end(), bias_grads.begin(), bias_grads.end());
  return grads;
}

Tensor add_gram_penalty_grad_(std::vector<Tensor> weights, std::vector<Tensor> biases,
                              std::vector<Tensor> grads, std::vector<Tensor> bias_grads,
                              Tensor coefficients, std::vector<int64_t> groups,
                              std::vector<int64_t> columns, std::vector<double> offsets,
                              std::string penalty) {
  const std::vector<Layer> layers = read_layers(weights, biases, groups, columns, offsets);
  check_coefficients(coefficients, weights);
  const std::vector<Gradient> targets = read_gradients(weights, biases, grads, bias_grads);
  const DeviceScope scope(weights[0]);
  const ScalarType type = compute_type(weights);
  const int64_t count = static_cast<int64_t>(layers.size());
  const cudaStream_t stream = current_stream(weights[0]);
  Tensor values = torch::stable::new_empty(weights[0], {count}, type);
  Tensor slopes = torch::stable::new_empty(weights[0], {slopes_size(layers)}, type);
  const auto first = is_double(weights) ? values_and_slopes<double> : values_and_slopes<float>;
  const auto second = is_double(weights) ? gradients<double, true> : gradients<float, true>;
  first(layers, penalty, values, slopes, stream);
  second(layers, targets, slopes, coefficients, stream);
  return values;
}

}  // namespace
}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, ORTHOREG_CUDA_KEY, m) {
  m.impl("gram_penalty", TORCH_BOX(&orthoreg::cuda::gram_penalty));
  m.impl("gram_penalty_grad", TORCH_BOX(&orthoreg::cuda::gram_penalty_grad));
  m.impl("add_gram_penalty_grad_", TORCH_BOX(&orthoreg::cuda::add_gram_penalty_grad_));
}
