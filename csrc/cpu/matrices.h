// Layers as matrices of the computing precision: in place where they are that already, else a copy
// that is converted, has the bias appended and the pruned filters zeroed.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "../common/layers.h"
#include "kernels.h"
#include "parallel.h"

namespace orthoreg::cpu {

// Calls visit(E{}) with the element type behind a ScalarType.
template <class Visit>
void visit_type(ScalarType type, const Visit& visit) {
  switch (type) {
    case ScalarType::Double:
      return visit(double{});
    case ScalarType::Half:
      return visit(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return visit(torch::headeronly::BFloat16{});
    default:
      return visit(float{});
  }
}

template <class T>
constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// The filters [groups * n, width] of one layer.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  std::vector<T> copy;
};

template <class T>
std::vector<Matrix<T>> read_matrices(const std::vector<Layer>& layers) {
  std::vector<Matrix<T>> out(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    Matrix<T>& matrix = out[l];
    if (layer.dtype == kScalarType<T> && layer.bias == nullptr && layer.pruned == nullptr) {
      matrix.data = static_cast<const T*>(layer.weight);
      matrix.stride = layer.stride;
      continue;
    }
    const int64_t filters = layer.groups * layer.n, width = layer.width();
    matrix.copy.resize(filters * width);  // zeros
    visit_type(layer.dtype, [&](auto element) {
      using E = decltype(element);
      const E* weight = static_cast<const E*>(layer.weight);
      const E* bias = static_cast<const E*>(layer.bias);
      for (int64_t i = 0; i < filters; ++i) {
        if (layer.is_pruned(i)) continue;
        T* row = matrix.copy.data() + i * width;
        for (int64_t j = 0; j < layer.k; ++j) row[j] = static_cast<T>(weight[i * layer.stride + j]);
        if (bias != nullptr) row[layer.k] = static_cast<T>(bias[i]);
      }
    });
    matrix.data = matrix.copy.data();
    matrix.stride = width;
  }
  return out;
}

// One panel of columns of one filter matrix: what a thread works on at a time.
struct Unit {
  int layer;
  int64_t group, column;
  double work;  // multiply-adds
};

struct Units {
  std::vector<Unit> list;  // the dearest first
  double work = 0;
};

// The panels of every layer.
template <class Columns, class Work>
Units make_units(const std::vector<Layer>& layers, const Columns& columns, const Work& work) {
  Units units;
  for (size_t l = 0; l < layers.size(); ++l) {
    for (int64_t group = 0; group < layers[l].groups; ++group) {
      for (int64_t column = 0; column < columns(layers[l]); column += kPanel) {
        units.list.push_back({static_cast<int>(l), group, column, work(layers[l], column)});
        units.work += units.list.back().work;
      }
    }
  }
  std::stable_sort(units.list.begin(), units.list.end(),
                   [](const Unit& a, const Unit& b) { return a.work > b.work; });
  return units;
}

}  // namespace orthoreg::cpu
