#include "gram.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace orthoreg::cpu {
namespace {

template <class T>
void run(const std::vector<Layer>& layers, Tensor& out) {
  AsItIs<T> epilogue;
  run_plan<T>(layers, plan_all(layers, {/*gram=*/true, /*gradient=*/false}),
              static_cast<T*>(out.mutable_data_ptr()), {}, epilogue);
}

Tensor gram(std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<int64_t> groups,
            std::vector<int64_t> columns, std::string precision) {
  read_precision(precision);  // refused here as it is on a GPU
  const std::vector<Layer> layers = read_layers(weights, biases, groups, columns);
  Tensor out = torch::stable::new_empty(weights[0], {slopes_size(layers)}, compute_type(weights));
  is_double(weights) ? run<double>(layers, out) : run<float>(layers, out);
  return out;
}

}  // namespace
}  // namespace orthoreg::cpu

STABLE_TORCH_LIBRARY_IMPL(orthoreg, CPU, m) { m.impl("gram", TORCH_BOX(&orthoreg::cpu::gram)); }
