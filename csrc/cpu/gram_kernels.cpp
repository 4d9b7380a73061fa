// Packing, products and exact sums for one instruction set: ORTHOREG_CPU_LEVEL. See vectors.h for
// what may not be here.
#include "gram_kernels.h"

#include "few_rows.h"
#include "vectors.h"

namespace orthoreg::cpu {
namespace ORTHOREG_CPU_LEVEL {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class E>
struct Stored {
  using Type = E;
};

// Calls visit(Stored<E>{}) with the stored type.
template <class T, class Visit>
void visit_storage(Storage storage, const Visit& visit) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (storage == Storage::kHalf) return visit(Stored<Half>{});
    if (storage == Storage::kBFloat16) return visit(Stored<BFloat16>{});
  }
  visit(Stored<T>{});
}

constexpr int kSecondCache = 2;  // where a prefetch brings to, in terms of __builtin_prefetch

// ---- packing: each entry is read once and converted; half a shuffle an entry where it is turned

// A square of lanes x lanes entries at a time is turned in registers.
template <class T, class E>
void pack_filters_of(const Filters& matrix, int64_t first, int64_t count, int64_t start,
                     int64_t depth, T* packed) {
  constexpr int64_t kWide = kLanes<T>;
  const E* weight = static_cast<const E*>(matrix.weight);
  const E* bias = static_cast<const E*>(matrix.bias);
  for (int64_t r = 0; r < count; r += kWide, packed += depth * kWide) {
    const E* row[kWide];
    bool all = true;
    for (int64_t i = 0; i < kWide; ++i) {
      const int64_t filter = first + r + i;
      const bool there = r + i < count && (matrix.pruned == nullptr || matrix.pruned[filter] == 0);
      row[i] = there ? weight + filter * matrix.stride + start : nullptr;
      all = all && there;
    }
    for (int64_t p = 0; p < depth; p += kWide) {
      const int64_t entries = matrix.k - start - p;  // after them the bias
      Vector<T> square[kWide];
      if (all && entries >= kWide) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWide; ++i) square[i] = load(row[i] + p);
        if (r + kWide < count) {  // the next sliver's
#pragma GCC unroll 16
          for (int64_t i = 0; i < kWide; ++i) {
            __builtin_prefetch(row[i] + kWide * matrix.stride + p, 0, kSecondCache);
          }
        }
      } else {
        for (int64_t i = 0; i < kWide; ++i) {
          square[i] = Vector<T>{};
          if (row[i] != nullptr) square[i] = load_some<T>(row[i] + p, entries);
        }
      }
      if (bias != nullptr && entries < kWide) {
        for (int64_t i = 0; i < kWide; ++i) {
          if (row[i] != nullptr) square[i][entries] = load_one<T>(bias + first + r + i);
        }
      }
      transpose<T>(square);
      T* out = packed + p * kWide;
      if (p + kWide <= depth) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWide; ++i) store(square[i], out + i * kWide);
      } else {
        for (int64_t i = 0; i < depth - p; ++i) store(square[i], out + i * kWide);
      }
    }
  }
}

// Some filters at a time, so that neither the reads nor the writes jump for each register.
template <class T, class E>
void pack_entries_of(const Filters& matrix, int64_t first, int64_t count, int64_t start,
                     int64_t depth, T* packed) {
  constexpr int64_t kWide = kLanes<T>, kFilters = 8;
  const E* weight = static_cast<const E*>(matrix.weight) + first;
  const E* bias = static_cast<const E*>(matrix.bias);
  for (int64_t from = 0; from < depth; from += kFilters) {
    const int64_t to = smaller(from + kFilters, depth);
    for (int64_t r = 0; r < count; r += kWide) {
      const int64_t entries = matrix.k - first - r;  // after them the bias
      const E* row = weight + (start + from) * matrix.stride + r;
      T* out = packed + r * depth + from * kWide;
      if (to - from == kFilters && entries >= kWide && matrix.pruned == nullptr) {
#pragma GCC unroll 8
        for (int64_t p = 0; p < kFilters; ++p) {
          __builtin_prefetch(row + (p + kFilters) * matrix.stride, 0, kSecondCache);
          store(load(row + p * matrix.stride), out + p * kWide);
        }
        continue;
      }
      for (int64_t p = from; p < to; ++p, row += matrix.stride, out += kWide) {
        const int64_t filter = start + p;
        Vector<T> values = {};
        if (matrix.pruned == nullptr || matrix.pruned[filter] == 0) {
          values = load_some<T>(row, entries);
          if (bias != nullptr && entries < kWide) values[entries] = load_one<T>(bias + filter);
        }
        store(values, out);
      }
    }
  }
}

template <class T>
void pack_filters(const Filters& matrix, int64_t first, int64_t count, int64_t start, int64_t depth,
                  T* packed) {
  visit_storage<T>(matrix.storage, [&](auto stored) {
    using E = typename decltype(stored)::Type;
    pack_filters_of<T, E>(matrix, first, count, start, depth, packed);
  });
}

template <class T>
void pack_entries(const Filters& matrix, int64_t first, int64_t count, int64_t start, int64_t depth,
                  T* packed) {
  visit_storage<T>(matrix.storage, [&](auto stored) {
    using E = typename decltype(stored)::Type;
    pack_entries_of<T, E>(matrix, first, count, start, depth, packed);
  });
}

// ---- products

// Rows of C that stay in registers, Width registers of each.
template <class T>
constexpr int kRows = ORTHOREG_VECTOR_BYTES == 64 ? 8
                      : kLanes<T> < 4             ? 2
                                                  : 4;
constexpr int kWidth = 3;

// C[kRows, Width registers] (+)= A B^T: for each inner entry, Width registers of B are multiplied
// by one entry of each row of A. 2 kRows Width lanes depth flops for kRows + Width loads an entry.
template <class T, int Width>
void block(const T* a, const T* b, int64_t step, int64_t depth, T* c, bool first, const char* next,
           int64_t next_stride) {
  using V = Vector<T>;
  constexpr int kWide = kLanes<T>;
#pragma GCC unroll 8
  for (int i = 0; i < kRows<T>; ++i) {
#pragma GCC unroll 4
    for (int w = 0; w <= Width; ++w) {
      __builtin_prefetch(next + i * next_stride + w * ORTHOREG_VECTOR_BYTES, 1);
    }
  }
  V sum[kRows<T>][Width] = {};
  for (int64_t p = 0; p < depth; ++p) {
    V right[Width];
#pragma GCC unroll 3
    for (int w = 0; w < Width; ++w) right[w] = load(b + w * step + p * kWide);
#pragma GCC unroll 8
    for (int i = 0; i < kRows<T>; ++i) {
      const T left = a[p * kWide + i];
#pragma GCC unroll 3
      for (int w = 0; w < Width; ++w) sum[i][w] += left * right[w];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows<T>; ++i) {
#pragma GCC unroll 3
    for (int w = 0; w < Width; ++w) {
      T* out = c + i * kTileStride + w * kWide;
      store(first ? sum[i][w] : load(out) + sum[i][w], out);
    }
  }
}

// Takes rows [i, i + count) and columns [j, j + width) of a finished tile to the target.
template <class T, class E>
void finish(const Product<T>& product, int64_t i, int64_t count, int64_t j, int64_t width) {
  const Target<T>& target = *product.target;
  const int64_t column = product.column + j;
  const int64_t entries = smaller(target.k - column, width);
  const T factor = target.factor;
  for (int64_t r = i; r < i + count; ++r) {
    const int64_t filter = product.row + r;
    const bool pruned = target.pruned != nullptr && target.pruned[filter] != 0;
    if (pruned && target.accumulate) continue;
    const T* from = product.c + r * kTileStride + j;
    const auto put = [&](const T* value, E* out, int64_t some) {
      Vector<T> sum = {};
      if (!pruned) sum = factor * load(value);
      if (target.accumulate) sum = load_some<T>(out, some) + sum;
      store_some<T>(sum, out, some);
    };
    E* row = static_cast<E*>(target.weight) + filter * target.stride + column;
    if (entries == width && width % kLanes<T> == 0 && target.accumulate) {
      for (int64_t p = 0; p < width; p += kLanes<T>) {
        store(load(row + p) + factor * load(from + p), row + p);
      }
      continue;
    }
    for (int64_t p = 0; p < entries; p += kLanes<T>) put(from + p, row + p, entries - p);
    if (target.bias != nullptr && 0 <= entries && entries < width) {
      T value[kLanes<T>] = {from[entries]};
      put(value, static_cast<E*>(target.bias) + filter, 1);
    }
  }
}

// One sliver of A stays in the first cache while all of B passes by.
template <class T>
void multiply(const Product<T>& product) {
  constexpr int64_t kWide = kLanes<T>;
  const int64_t slivers = (product.columns + kWide - 1) / kWide;
  for (int64_t i = 0; i < product.rows; i += kWide) {
    const int64_t count = smaller(kWide, product.rows - i);
    const int64_t last = product.lower ? i / kWide + 1 : slivers;
    for (int64_t s = 0; s < last;) {
      const int64_t rest = last - s, width = rest == 4 ? 2 : smaller(rest, kWidth);
      const int64_t j = s * kWide, columns = smaller(width * kWide, product.columns - j);
      for (int64_t r = 0; r < count; r += kRows<T>) {
        const T* a = product.a + i / kWide * product.a_step + r;
        const T* b = product.b + s * product.b_step;
        T* c = product.c + (i + r) * kTileStride + j;
        const char* next = reinterpret_cast<const char*>(c);
        int64_t next_stride = kTileStride * sizeof(T);
        if (product.target != nullptr) {
          const int64_t bytes = product.target->storage == Storage::kComputed ? sizeof(T) : 2;
          next_stride = product.target->stride * bytes;
          next = static_cast<const char*>(product.target->weight) +
                 (product.row + i + r) * next_stride + (product.column + j) * bytes;
        }
        const auto compute = width == 3 ? &block<T, 3> : width == 2 ? &block<T, 2> : &block<T, 1>;
        compute(a, b, product.b_step, product.depth, c, product.first, next, next_stride);
      }
      if (product.target != nullptr) {
        visit_storage<T>(product.target->storage, [&](auto stored) {
          finish<T, typename decltype(stored)::Type>(product, i, count, j, columns);
        });
      }
      s += width;
    }
  }
}

// ---- sums in double, where the square of a float32 is exact

template <class T>
void add_squares(const T* packed, int64_t rows, int64_t depth, double* sums) {
  constexpr int kWide = kLanes<double>, kChains = 4;
  using Wide = Vector<double>;
  for (int64_t r = 0; r < rows; r += kLanes<T>, packed += depth * kLanes<T>) {
    for (int64_t part = 0; part < kLanes<T>; part += kWide) {
      Wide sum[kChains] = {};
      const T* from = packed + part;
      int64_t p = 0;
      for (; p + kChains <= depth; p += kChains) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) {
          const Wide wide = load_as<double>(from + (p + c) * kLanes<T>);
          sum[c] += wide * wide;
        }
      }
      for (; p < depth; ++p) {
        const Wide wide = load_as<double>(from + p * kLanes<T>);
        sum[0] += wide * wide;
      }
      double* out = sums + r + part;
      store(load(out) + ((sum[0] + sum[1]) + (sum[2] + sum[3])), out);
    }
  }
}

// A square of lanes x lanes entries of a symmetric matrix, given by those on and below its
// diagonal.
template <class T>
void store_diagonal_square(const T* square, T* out) {
  constexpr int64_t kWide = kLanes<T>;
  Vector<T> rows[kWide], turned[kWide];
  typename IndexVector<T>::Type lane;
  for (int64_t i = 0; i < kWide; ++i) {
    rows[i] = turned[i] = load(square + i * kTileStride);
    lane[i] = static_cast<typename IndexOf<T>::Type>(i);
  }
  transpose<T>(turned);
  using Index = typename IndexOf<T>::Type;
  for (int64_t i = 0; i < kWide; ++i) {
    store(lane <= static_cast<Index>(i) ? rows[i] : turned[i], out + i * kWide);
  }
}

// Slivers of the tile's columns are there already, those of its rows have to be turned.
template <class T>
void store_symmetric(const T* tile, int64_t rows, int64_t columns, bool diagonal, int64_t row,
                     int64_t column, int64_t m, T* packed) {
  constexpr int64_t kWide = kLanes<T>;
  for (int64_t i = 0; i < rows; i += kWide) {
    const T* from = tile + i * kTileStride;
    const int64_t height = smaller(kWide, rows - i), end = diagonal ? i : columns;
    T* sliver = packed + (row + i) * m;
    for (int64_t j = 0; j < end; j += kWide) {
      T* above = packed + (column + j) * m + (row + i) * kWide;
      Vector<T> square[kWide];
      for (int64_t r = 0; r < kWide; ++r) {
        square[r] = load(from + r * kTileStride + j);
        if (r < height) store(square[r], above + r * kWide);
      }
      transpose<T>(square);
      const int64_t width = smaller(kWide, end - j);
      for (int64_t r = 0; r < width; ++r) store(square[r], sliver + (column + j + r) * kWide);
    }
    if (!diagonal) continue;
    alignas(64) T square[kWide * kWide];
    store_diagonal_square<T>(from + i, square);
    T* out = sliver + (row + i) * kWide;
    for (int64_t r = 0; r < height; ++r) store(load(square + r * kWide), out + r * kWide);
  }
}

template <class T>
void transpose_matrix(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                      int64_t out_stride) {
  constexpr int64_t kWide = kLanes<T>;
  for (int64_t i = 0; i < rows; i += kWide) {
    for (int64_t j = 0; j < columns; j += kWide) {
      Vector<T> square[kWide];
      const int64_t height = smaller(kWide, rows - i), width = smaller(kWide, columns - j);
      const T* from = in + i * in_stride + j;
      T* to = out + j * out_stride + i;
      if (height == kWide && width == kWide) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kWide; ++r) square[r] = load(from + r * in_stride);
        transpose<T>(square);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kWide; ++r) store(square[r], to + r * out_stride);
      } else {
        for (int64_t r = 0; r < kWide; ++r) {
          square[r] = r < height ? load_some<T>(from + r * in_stride, width) : Vector<T>{};
        }
        transpose<T>(square);
        for (int64_t r = 0; r < width; ++r) store_some<T>(square[r], to + r * out_stride, height);
      }
    }
  }
}

template <class T>
constexpr GramKernels<T> kKernels = {kLanes<T>,     &pack_filters<T>,    &pack_entries<T>,
                                     &multiply<T>,  &store_symmetric<T>, &add_squares<T>,
                                     &add_pairs<T>, &transpose_matrix<T>};

}  // namespace

extern const GramKernels<float> float_gram_kernels = kKernels<float>;
extern const GramKernels<double> double_gram_kernels = kKernels<double>;

}  // namespace ORTHOREG_CPU_LEVEL
}  // namespace orthoreg::cpu
