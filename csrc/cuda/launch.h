// From checked layers to the parameters of the tiled kernels.
#pragma once

#include <memory>
#include <vector>

#include "runtime.h"
#include "tiles.cuh"

namespace orthoreg::cuda {

inline Type element_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return Type::kFloat;
  }
}

inline std::vector<Shape> shapes(const std::vector<Layer>& layers) {
  std::vector<Shape> out;
  for (const Layer& l : layers) out.push_back({l.groups, l.n, l.width(), l.columns});
  return out;
}

// Calls launch(problems, first layer) for each launch of the plan. Layers without a block still
// take part: finish_penalty gives them their value.
template <class Units, class Run>
void for_each_launch(const std::vector<Layer>& layers, const std::vector<Gradient>& grads,
                     const Units& units, const Run& run) {
  const auto problems = std::make_unique<Problems>();  // 30 KB, too much for some stacks
  for (const Launch& launch : plan_launches(shapes(layers), units)) {
    problems->count = launch.last - launch.first;
    problems->units = static_cast<int32_t>(launch.first_unit.back());
    for (int i = launch.first; i < launch.last; ++i) {
      const Layer& l = layers[i];
      Problem& p = problems->layer[i - launch.first];
      p = {l.weight,
           l.bias,
           grads.empty() ? nullptr : grads[i].weight,
           grads.empty() ? nullptr : grads[i].bias,
           l.stride,
           grads.empty() ? 0 : grads[i].stride,
           l.slopes,
           l.offset,
           static_cast<int32_t>(l.n),
           static_cast<int32_t>(l.k),
           static_cast<int32_t>(l.width()),
           static_cast<int32_t>(launch.first_unit[i - launch.first]),
           element_type(l.dtype),
           l.columns};
    }
    run(*problems, launch.first);
  }
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace orthoreg::cuda
