// Grouped Gram matrices and the products S W of their slopes: all layers in one parallel region.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "gram_kernels.h"
#include "gram_plan.h"
#include "matrices.h"
#include "parallel.h"

namespace orthoreg::cpu {

struct AlignedMemory {
  static constexpr std::align_val_t kAlignment{64};

  explicit AlignedMemory(size_t bytes)
      : start(static_cast<char*>(::operator new(bytes, kAlignment))) {}
  ~AlignedMemory() { ::operator delete(start, kAlignment); }
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;

  char* const start;
};

// What one thread works in. The memory is kept as long as the thread, because that of every call
// would have to be mapped anew.
template <class T>
struct Scratch {
  static constexpr int64_t kPacked = kPackDepth * kEdge, kTile = kEdge * kTileStride;

  T *a, *b;      // packed operands
  T* tile;       // [kEdge, kTileStride]
  T* slopes;     // of a whole unit
  double* sums;  // of a tile: exact ones of its diagonal, or all where the rows are few
  double* diagonal;

  static Scratch of_this_thread() {
    constexpr int64_t kEntries = 2 * kPacked + kTile + kWholeSlopes;
    constexpr int64_t kSums = std::max(kEdge, kFew * kFew);
    static thread_local const AlignedMemory memory(kEntries * sizeof(T) +
                                                   (kSums + kEdge) * sizeof(double));
    T* const start = reinterpret_cast<T*>(memory.start);
    double* const exact = reinterpret_cast<double*>(start + kEntries);
    T* const tile = start + 2 * kPacked;
    return {start, start + kPacked, tile, tile + kTile, exact, exact + kSums};
  }
};

// A tile on or below the diagonal of one Gram matrix. On the diagonal, only the entries below it
// and `diagonal` hold anything.
template <class T>
struct GramTile {
  T* g;  // [rows.count, kTileStride]
  Range rows, columns;
  const double*
      diagonal;  // null off the diagonal; in double, for near orthonormality G - I cancels
};

inline Storage storage_of(const Layer& layer) {
  return layer.dtype == ScalarType::Half       ? Storage::kHalf
         : layer.dtype == ScalarType::BFloat16 ? Storage::kBFloat16
                                               : Storage::kComputed;
}

inline int64_t element_bytes(const Layer& layer) {
  return layer.dtype == ScalarType::Double ? 8 : layer.dtype == ScalarType::Float ? 4 : 2;
}

template <class Pointer>
Pointer* advance(Pointer* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + bytes;
}

inline Filters group_filters(const Layer& layer, int64_t group) {
  const int64_t first = group * layer.n, bytes = element_bytes(layer);
  return {advance(layer.weight, first * layer.stride * bytes),
          advance(layer.bias, first * bytes),
          layer.pruned == nullptr ? nullptr : layer.pruned + first,
          storage_of(layer),
          layer.stride,
          layer.k};
}

template <class T>
Target<T> group_target(const Layer& layer, int64_t group, const Gradient& gradient, T factor,
                       bool accumulate) {
  const int64_t first = group * layer.n, bytes = element_bytes(layer);
  return {advance(gradient.weight, first * gradient.stride * bytes),
          advance(gradient.bias, first * bytes),
          layer.pruned == nullptr ? nullptr : layer.pruned + first,
          storage_of(layer),
          gradient.stride,
          layer.k,
          factor,
          accumulate};
}

// The Gram matrix of at most kFew rows. Packed across is what the other packer makes, for which
// rows and inner entries change places. Each part is whole slivers or ends with the matrix.
template <class T>
GramTile<T> form_few(const Layer& layer, int64_t group, const Scratch<T>& scratch) {
  const GramKernels<T>& kernels = gram_kernels<T>();
  const Filters w = group_filters(layer, group);
  const auto pack_across = layer.columns ? kernels.pack_filters : kernels.pack_entries;
  const int64_t m = layer.m();
  static_assert(kFewSlivers * 16 * kFew <= Scratch<T>::kPacked, "a part fits into scratch.a");
  std::fill_n(scratch.sums, m * kFew, 0.0);
  for_even_ranges(layer.inner(), kFewSlivers * kernels.lanes, [&](Range part) {
    pack_across(w, part.start, part.count, 0, m, scratch.a);
    kernels.add_pairs(scratch.a, m, divide_up(part.count, kernels.lanes), scratch.sums);
  });
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      scratch.tile[i * kTileStride + j] = static_cast<T>(scratch.sums[i * kFew + j]);
    }
    scratch.diagonal[i] = scratch.sums[i * kFew + i];
  }
  return {scratch.tile, {0, m}, {0, m}, scratch.diagonal};
}

// Rows: G = W W^T, W packed by filters. Columns: G = W^T W, by entries.
template <class T>
GramTile<T> form_gram_tile(const Layer& layer, int64_t group, Range rows, Range columns,
                           const Scratch<T>& scratch) {
  if (layer.m() <= kFew) return form_few(layer, group, scratch);
  const GramKernels<T>& kernels = gram_kernels<T>();
  const Filters w = group_filters(layer, group);
  const auto pack = layer.columns ? kernels.pack_entries : kernels.pack_filters;
  const bool diagonal = rows.start == columns.start;
  T* const g = scratch.tile;
  if (diagonal) std::fill_n(scratch.sums, kEdge, 0.0);
  if (layer.inner() == 0) std::fill_n(g, rows.count * kTileStride, T(0));
  for_even_ranges(layer.inner(), kPackDepth, [&](Range part) {
    pack(w, rows.start, rows.count, part.start, part.count, scratch.a);
    if (!diagonal) pack(w, columns.start, columns.count, part.start, part.count, scratch.b);
    const int64_t step = part.count * kernels.lanes;
    kernels.multiply({scratch.a, diagonal ? scratch.a : scratch.b, step, step, rows.count,
                      columns.count, part.count, g, part.start == 0, diagonal, nullptr, 0, 0});
    if (diagonal) kernels.add_squares(scratch.a, rows.count, part.count, scratch.sums);
  });
  if (!diagonal) return {g, rows, columns, nullptr};
  for (int64_t i = 0; i < rows.count; ++i) {
    scratch.diagonal[i] = scratch.sums[i];
    g[i * kTileStride + i] = static_cast<T>(scratch.diagonal[i]);
  }
  return {g, rows, columns, scratch.diagonal};
}

// A symmetric matrix [m, m]: `lanes` rows at a time lie in a sliver, so that it is packed already,
// or one row does, which is torch's order.
template <class T>
struct Symmetric {
  T* data;
  int64_t m, lanes;

  T& at(int64_t i, int64_t j) const { return data[i / lanes * lanes * m + j * lanes + i % lanes]; }
};

// Writes a tile to its place in the matrix, and its mirror image.
template <class T>
void store_tile(const GramTile<T>& tile, const Symmetric<T>& matrix) {
  const GramKernels<T>& kernels = gram_kernels<T>();
  const bool diagonal = tile.diagonal != nullptr;
  const int64_t m = matrix.m;
  if (m == 0) return;
  if (matrix.lanes > 1) {
    return kernels.store_symmetric(tile.g, tile.rows.count, tile.columns.count, diagonal,
                                   tile.rows.start, tile.columns.start, m, matrix.data);
  }
  T* const above = &matrix.at(tile.columns.start, tile.rows.start);
  for (int64_t i = 0; i < tile.rows.count; ++i) {
    const T* row = tile.g + i * kTileStride;
    T* const below = &matrix.at(tile.rows.start + i, tile.columns.start);
    std::copy_n(row, diagonal ? i + 1 : tile.columns.count, below);
    if (diagonal) {
      for (int64_t j = i / 16 * 16; j < i; ++j) above[j * m + i] = row[j];
    }
  }
  for (int64_t i = 0; i < tile.rows.count; i += 16) {
    kernels.transpose(tile.g + i * kTileStride, kTileStride,
                      std::min<int64_t>(16, tile.rows.count - i), diagonal ? i : tile.columns.count,
                      above + i, m);
  }
}

// Rows: S W. Columns: W S. The tile goes to the target, as part of which it is given.
template <class T>
void form_gradient_tile(const Layer& layer, int64_t group, Range rows, Range columns,
                        const Symmetric<T>& slopes, const Target<T>& target,
                        const Scratch<T>& scratch) {
  const GramKernels<T>& kernels = gram_kernels<T>();
  const int64_t m = slopes.m, lanes = kernels.lanes;
  const Filters w = group_filters(layer, group);
  const Filters s{slopes.data, nullptr, nullptr, Storage::kComputed, m, m};
  const Range side = layer.columns ? columns : rows;  // of the slopes
  for_even_ranges(m, kPackDepth, [&](Range part) {
    T *a = scratch.a, *b = scratch.b;
    const int64_t packed_step = part.count * lanes;
    int64_t slopes_step = packed_step;
    T*& operand = layer.columns ? b : a;
    if (slopes.lanes == lanes) {
      operand = &slopes.at(side.start, part.start);
      slopes_step = m * lanes;
    } else {
      kernels.pack_entries(s, side.start, side.count, part.start, part.count, operand);
    }
    if (layer.columns) {
      kernels.pack_filters(w, rows.start, rows.count, part.start, part.count, a);
    } else {
      kernels.pack_entries(w, columns.start, columns.count, part.start, part.count, b);
    }
    const bool last = part.start + part.count == m;
    kernels.multiply({a, b, layer.columns ? packed_step : slopes_step,
                      layer.columns ? slopes_step : packed_step, rows.count, columns.count,
                      part.count, scratch.tile, part.start == 0, false, last ? &target : nullptr,
                      rows.start, columns.start});
  });
}

// Where gradients go and by what they are multiplied; `gradients` is null if none are wanted.
template <class T>
struct GradientCall {
  const std::vector<Gradient>* gradients = nullptr;
  const T* coefficients = nullptr;  // [L]
  bool accumulate = false;

  template <class Epilogue>
  Target<T> target(const Layer& layer, int l, int64_t group, const Epilogue& epilogue) const {
    return group_target(layer, group, (*gradients)[l], epilogue.factor(l, coefficients[l]),
                        accumulate);
  }
};

// The epilogue that leaves everything as it is.
template <class T>
struct AsItIs {
  void tile(size_t, int, int64_t, const GramTile<T>&) {}
  void matrix(int, int64_t, Symmetric<T>) {}
  void layer(int) {}
  T factor(int, T coefficient) const { return gradient_factor<T>(coefficient, nullptr); }
};

// Runs a plan. The Gram matrices of layer l, or what the epilogue makes of them, go to (or come
// from) slopes + plan.slopes[l]. The epilogue has
//
//   void tile(size_t unit, int l, int64_t group, const GramTile<T>&)   may overwrite the tile
//   void matrix(int l, int64_t group, Symmetric<T>)   before any gradient is made of it
//   void layer(int l)                                 when it is whole, where gradients follow
//   T factor(int l, T coefficient)                    what the layer's gradients are multiplied by
template <class T, class Epilogue>
void run_plan(const std::vector<Layer>& layers, const GramPlan& plan, T* slopes,
              const GradientCall<T>& call, Epilogue& epilogue) {
  const auto tiles_left = std::make_unique<std::atomic<int>[]>(layers.size());  // then -1
  for (size_t l = 0; l < layers.size(); ++l) {
    tiles_left[l].store(plan.gram_tiles[l] > 0 ? plan.gram_tiles[l] : -1);
  }
  const bool own = plan.stages.gram && plan.stages.gradient;
  const int64_t lanes = own ? gram_kernels<T>().lanes : 1;
  const auto matrix_of = [&](int l, int64_t group) {
    const int64_t m = layers[l].m();
    return Symmetric<T>{slopes + plan.slopes[l] + group * plan.matrix_size(m), m, lanes};
  };
  const auto gram_tile = [&](size_t u, const Unit& unit, const Scratch<T>& scratch) {
    const Layer& layer = layers[unit.layer];
    const int64_t group = unit.groups.start;
    const GramTile<T> tile = form_gram_tile(layer, group, unit.rows, unit.columns, scratch);
    epilogue.tile(u, unit.layer, group, tile);
    store_tile(tile, matrix_of(unit.layer, group));
    if (tiles_left[unit.layer].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (int64_t g = 0; g < layer.groups; ++g) {
      epilogue.matrix(unit.layer, g, matrix_of(unit.layer, g));
    }
    if (plan.stages.gradient) epilogue.layer(unit.layer);
    tiles_left[unit.layer].store(-1, std::memory_order_release);
  };
  const auto gradient_tile = [&](const Unit& unit, const Scratch<T>& scratch) {
    // whoever has a tile of that matrix took it before this unit was taken, and is working on it
    for (int spins = 0; tiles_left[unit.layer].load(std::memory_order_acquire) != -1;) {
      if (spins < 1000) {
        ++spins;
      } else {
        std::this_thread::yield();
      }
    }
    form_gradient_tile<T>(layers[unit.layer], unit.groups.start, unit.rows, unit.columns,
                          matrix_of(unit.layer, unit.groups.start),
                          call.target(layers[unit.layer], unit.layer, unit.groups.start, epilogue),
                          scratch);
  };
  const auto whole = [&](size_t u, const Unit& unit, const Scratch<T>& scratch) {
    const Layer& layer = layers[unit.layer];
    const Range all{0, layer.m()};
    for (int64_t g = unit.groups.start; g < unit.groups.start + unit.groups.count; ++g) {
      const Symmetric<T> s =
          own ? Symmetric<T>{scratch.slopes, layer.m(), lanes} : matrix_of(unit.layer, g);
      if (plan.stages.gram) {
        const GramTile<T> tile = form_gram_tile(layer, g, all, all, scratch);
        epilogue.tile(u, unit.layer, g, tile);
        store_tile(tile, s);
        epilogue.matrix(unit.layer, g, s);
      }
      if (!plan.stages.gradient) continue;
      if (plan.stages.gram && layer.groups == 1) epilogue.layer(unit.layer);
      const Target<T> target = call.target(layer, unit.layer, g, epilogue);
      for_even_ranges(layer.width(), kEdge, [&](Range columns) {
        for_even_ranges(layer.n, kEdge, [&](Range rows) {
          form_gradient_tile<T>(layer, g, rows, columns, s, target, scratch);
        });
      });
    }
  };
  for_each_unit(
      static_cast<int64_t>(plan.units.size()), plan.work,
      [] { return Scratch<T>::of_this_thread(); },
      [&](int64_t u, const Scratch<T>& scratch) {
        const Unit& unit = plan.units[u];
        if (unit.kind == UnitKind::kGramTile) {
          gram_tile(u, unit, scratch);
        } else if (unit.kind == UnitKind::kGradientTile) {
          gradient_tile(unit, scratch);
        } else {
          whole(u, unit, scratch);
        }
      });
}

}  // namespace orthoreg::cpu
