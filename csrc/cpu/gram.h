// Grouped Gram matrices: all layers in one parallel region.
#pragma once

#include <vector>

#include "matrices.h"

namespace orthoreg::cpu {

// Forms every Gram matrix of every layer in out [sum of g m m], a panel of 32 columns of its lower
// triangle a unit, and calls finish(unit, g, rows, columns, ld, diagonal) for it: g points at the
// diagonal entry of the panel's first column, rows and columns are the panel's, ld is m; diagonal
// holds the panel's diagonal entries in double, because near orthonormality G - I cancels. After
// that the panel is mirrored into the upper triangle.
template <class T, class Finish>
void for_each_gram_panel(const std::vector<Layer>& layers, const std::vector<Matrix<T>>& matrices,
                         const Units& units, T* out, const Finish& finish) {
  const Kernels<T>& kernel = kernels<T>();
  for_each_unit(
      static_cast<int64_t>(units.list.size()), units.work,
      [] { return std::vector<T>(kDepth * kPanel); },
      [&](int64_t u, std::vector<T>& packed) {
        const Unit& unit = units.list[u];
        const Layer& layer = layers[unit.layer];
        const Matrix<T>& matrix = matrices[unit.layer];
        const int64_t m = layer.m(), column = unit.column;
        const T* data = matrix.data + unit.group * layer.n * matrix.stride;
        // rows: G = W W^T, a = W, b = W^T;  columns: G = W^T W, a = W^T, b = W
        const int64_t along = layer.columns ? 1 : matrix.stride;
        const int64_t across = layer.columns ? matrix.stride : 1;
        const int64_t rows = m - column, columns = std::min(kPanel, rows);
        T* base = out + layer.slopes + unit.group * m * m;
        T* g = base + column * m + column;
        const Strided<T> a{data + column * along, along, across};
        double diagonal[kPanel];
        if (m <= kSmall) {
          double exact[kSmall * kSmall];
          kernel.pairs(a, m, layer.inner(), exact);
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < m; ++j) g[i * m + j] = static_cast<T>(exact[i * m + j]);
            diagonal[i] = exact[i * m + i];
          }
        } else {
          kernel.product(a, {a.data, across, along}, rows, columns, layer.inner(), g, m,
                         packed.data());
          kernel.squares(a, columns, layer.inner(), diagonal);
          for (int64_t j = 0; j < columns; ++j) g[j * m + j] = static_cast<T>(diagonal[j]);
        }
        finish(u, g, rows, columns, m, diagonal);
        for (int64_t i = 1; i < rows; ++i) {
          for (int64_t j = 0; j < std::min(i, columns); ++j) g[j * m + i] = g[i * m + j];
        }
      });
}

inline Units gram_panels(const std::vector<Layer>& layers) {
  return make_units(
      layers, [](const Layer& layer) { return layer.m(); },
      [](const Layer& layer, int64_t column) {
        const int64_t rows = layer.m() - column;
        return static_cast<double>(rows) * std::min(kPanel, rows) * layer.inner();
      });
}

}  // namespace orthoreg::cpu
