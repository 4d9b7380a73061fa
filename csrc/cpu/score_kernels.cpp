// The inner loops of the filter scores, in GCC's and Clang's vector types, for one instruction set:
// ORTHOREG_CPU_LEVEL.
//
// One pass: kRows rows by kStrip columns at a time are read once from memory. Each vector of
// entries is turned into |w|, w^2, |wg|, (wg)^2 and wg, which are added in registers to the sums of
// its row and, where input channels are scored, to those of its column; these then join the sums of
// the strip in the nearest cache. What is read next is prefetched.
//
// Precision: sums of what has no sign are float for at most kRun + kRuns additions along a row, and
// kRows + kRuns along a column, then added in double: their relative error is certainly below 1e-6.
// The sum of wg may cancel and is made in double throughout, where the product of two floats is
// exact. A row's sums depend on its entries alone, whatever else is scored. Squares and products of
// floats may leave their range: the launcher sees that in the sums, and repeats them in double.
//
// Cost: per entry 8 bytes from memory (float; 16 with F, of which 4 are written back too). Per
// vector 7 operations, 7 more for the row's sums and 8 for the columns'.
//
// Nothing here may be an inline function with external linkage (std:: included): the linker could
// keep the copy of the widest instruction set for everybody.
#include "score_kernels.h"

#include "score_vectors.h"

#if defined(__AVX512F__)
#define ORTHOREG_SCORE_ROWS 4
#else
#define ORTHOREG_SCORE_ROWS 2
#endif

#define ORTHOREG_INLINE inline __attribute__((always_inline))

namespace orthoreg::cpu {
namespace ORTHOREG_CPU_LEVEL {
namespace {

constexpr int kRows = ORTHOREG_SCORE_ROWS;
constexpr int64_t kRun = 8;   // additions in float that make a run
constexpr int64_t kRuns = 8;  // runs added in float, before their sum is added in double
constexpr int64_t kStrip =
    64 * kLanes<float> < 512 ? 64 * kLanes<float> : 512;  // columns of a tile
static_assert(kStrip <= kRun * kRuns * kLanes<float>, "");
constexpr int64_t kAheadBytes = 1024;  // how far a single row is prefetched

// What is summed: of w alone, with its gradients, with the accumulated squares of these.
template <bool Grad, bool Fisher, bool Columns>
struct Mode {
  static constexpr bool kGrad = Grad, kFisher = Fisher, kColumns = Columns;
  static constexpr int kCount = Fisher ? kSquareWFisher + 1 : Grad ? kSquareWg + 1 : kSquareW + 1;
};

// The statistics but wg of a vector of entries, lane by lane, and wg in double: its parts, or their
// sum.
template <class T, int Parts>
struct Sums {
  typename Vectors<T>::V of[kStatistics];
  Wide wg[Parts];
};
template <class T>
using RowSums = Sums<T, 1>;
template <class T>
using ColumnSums = Sums<T, Vectors<T>::kParts>;

// Adds one vector of entries of a row to the sums of its row and to those of its columns.
template <class E, class Mode>
ORTHOREG_INLINE void add_entries(const E* w, const E* g, typename Read<E>::T* f,
                                 RowSums<typename Read<E>::T>& row,
                                 ColumnSums<typename Read<E>::T>& column) {
  using T = typename Read<E>::T;
  using V = typename Vectors<T>::V;
  const V x = Read<E>::vector(w), abs_w = Vectors<T>::abs(x);
  row.of[kAbsW] += abs_w;
  row.of[kSquareW] += x * x;
  if constexpr (Mode::kColumns) {
    column.of[kAbsW] += abs_w;
    column.of[kSquareW] += x * x;
  }
  if constexpr (Mode::kGrad) {
    const V slope = Read<E>::vector(g), y = x * slope, abs_wg = Vectors<T>::abs(y);
    row.of[kAbsWg] += abs_wg;
    row.of[kSquareWg] += y * y;
    if constexpr (Mode::kColumns) {
      column.of[kAbsWg] += abs_wg;
      column.of[kSquareWg] += y * y;
    }
#pragma GCC unroll 2
    for (int i = 0; i < Vectors<T>::kParts; ++i) {
      const Wide wg = Read<E>::product(w, g, y, i);
      row.wg[0] += wg;
      if constexpr (Mode::kColumns) column.wg[i] += wg;
    }
    if constexpr (Mode::kFisher) {
      V* to = reinterpret_cast<V*>(f);
      const V fisher = slope * slope + *to, weighed = x * fisher;
      *to = fisher;
      row.of[kSquareWFisher] += x * weighed;
      if constexpr (Mode::kColumns) column.of[kSquareWFisher] += x * weighed;
    }
  }
}

// Asks for the line of memory at p[count], which need not belong to anything, for the cache in
// which it can wait.
template <class E>
ORTHOREG_INLINE void prefetch(const E* p, int64_t count) {
  constexpr int kRead = 0, kSecondLevel = 2;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + count * sizeof(E);
  __builtin_prefetch(reinterpret_cast<const void*>(at), kRead, kSecondLevel);
}

// Where rows lie: entry (i, j) is at w[i * w_stride + j]. What is read next starts `ahead_*` on.
template <class E>
struct Tile {
  const E *w, *g;
  typename Read<E>::T* f;
  int64_t w_stride, g_stride, f_stride;
  int64_t ahead_w, ahead_g;
};

// The tile at (i, j); the next one is `down` rows and `right` columns on.
template <class E, class Mode>
Tile<E> tile_at(const ScoreBlock& block, int64_t i, int64_t j, int64_t down, int64_t right) {
  using T = typename Read<E>::T;
  return {static_cast<const E*>(block.w) + i * block.w_stride + j,
          Mode::kGrad ? static_cast<const E*>(block.g) + i * block.g_stride + j : nullptr,
          Mode::kFisher ? static_cast<T*>(block.f) + i * block.f_stride + j : nullptr,
          block.w_stride,
          block.g_stride,
          block.f_stride,
          down * block.w_stride + right,
          down * block.g_stride + right};
}

// The sums of a strip of columns.
template <class T>
struct StripSums {
  T of[kStatistics][kStrip];
  double wg[kStrip];
};

// A vector of columns of Rows rows. Meanwhile the same one of the next tile is prefetched.
template <class E, class Mode, int Rows>
ORTHOREG_INLINE void add_vector(const Tile<E>& tile, int64_t j, RowSums<typename Read<E>::T>* rows,
                                StripSums<typename Read<E>::T>* strip, int64_t strip_j) {
  using T = typename Read<E>::T;
  using V = typename Vectors<T>::V;
  ColumnSums<T> column = {};
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    const E* w = tile.w + i * tile.w_stride + j;
    const E* g = Mode::kGrad ? tile.g + i * tile.g_stride + j : nullptr;
    prefetch(w, tile.ahead_w);
    if constexpr (Mode::kGrad) prefetch(g, tile.ahead_g);
    add_entries<E, Mode>(w, g, Mode::kFisher ? tile.f + i * tile.f_stride + j : nullptr, rows[i],
                         column);
  }
  if constexpr (Mode::kColumns) {
#pragma GCC unroll 6
    for (int s = 0; s < Mode::kCount; ++s) {
      if (s != kWg) *reinterpret_cast<V*>(&strip->of[s][strip_j]) += column.of[s];
    }
    if constexpr (Mode::kGrad) {
#pragma GCC unroll 2
      for (int i = 0; i < Vectors<T>::kParts; ++i) {
        *reinterpret_cast<Wide*>(&strip->wg[strip_j + i * kWideLanes]) += column.wg[i];
      }
    }
  }
}

// The last columns of Rows rows, fewer than a vector, followed by zeros.
template <class E, class Mode, int Rows>
void add_rest(const Tile<E>& tile, int64_t j, int64_t count, RowSums<typename Read<E>::T>* rows,
              StripSums<typename Read<E>::T>* strip) {
  using T = typename Read<E>::T;
  constexpr int kLanes = Vectors<T>::kLanes;
  E w[Rows * kLanes] = {}, g[Rows * kLanes] = {};
  T f[Rows * kLanes] = {};
  for (int i = 0; i < Rows; ++i) {
    const int64_t to = i * kLanes;
    __builtin_memcpy(w + to, tile.w + i * tile.w_stride + j, count * sizeof(E));
    if constexpr (Mode::kGrad) {
      __builtin_memcpy(g + to, tile.g + i * tile.g_stride + j, count * sizeof(E));
    }
    if constexpr (Mode::kFisher) {
      __builtin_memcpy(f + to, tile.f + i * tile.f_stride + j, count * sizeof(T));
    }
  }
  add_vector<E, Mode, Rows>({w, g, f, kLanes, kLanes, kLanes, 0, 0}, 0, rows, strip, j);
  if constexpr (Mode::kFisher) {
    for (int i = 0; i < Rows; ++i) {
      __builtin_memcpy(tile.f + i * tile.f_stride + j, f + i * kLanes, count * sizeof(T));
    }
  }
}

// What is kept of a row between tiles, in the scratch memory of a block.
template <class T>
struct RowTotals {
  typename Vectors<T>::V runs[kStatistics];  // of at most kRuns runs
  Wide total[kStatistics];

  ORTHOREG_INLINE void add_run(const RowSums<T>& row, int count) {
#pragma GCC unroll 6
    for (int s = 0; s < count; ++s) {
      if (s != kWg) runs[s] += row.of[s];
    }
    if (count > kWg) total[kWg] += row.wg[0];
  }
  void end_runs(int count) {
    for (int s = 0; s < count; ++s) {
      if (s == kWg) continue;
      for (int i = 0; i < Vectors<T>::kParts; ++i) total[s] += Vectors<T>::part(runs[s], i);
      runs[s] = typename Vectors<T>::V{};
    }
  }
  void sum(double* out) const {
    for (int s = 0; s < kStatistics; ++s) {
      out[s] = 0;
      for (int lane = 0; lane < kWideLanes; ++lane) out[s] += total[s][lane];
    }
  }
};

// Rows rows by `columns` columns: adds to `totals` and to `strip`.
template <class E, class Mode, int Rows>
void add_tile(const Tile<E>& tile, int64_t columns, RowTotals<typename Read<E>::T>* totals,
              StripSums<typename Read<E>::T>* strip) {
  using T = typename Read<E>::T;
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  for (int64_t j = 0; j < columns;) {
    const int64_t end = j + kRun * kLanes < columns ? j + kRun * kLanes : columns;
    RowSums<T> rows[Rows] = {};
    for (; j + kLanes <= end; j += kLanes) {
      add_vector<E, Mode, Rows>(tile, j, rows, strip, j);
    }
    if (j < end) {
      add_rest<E, Mode, Rows>(tile, j, end - j, rows, strip);
      j = end;
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) totals[i].add_run(rows[i], Mode::kCount);
  }
}

// A strip of columns: their sums are kept in the nearest cache for kRows * kRuns rows at a time.
template <class E, class Mode>
void add_strip(const ScoreBlock& block, int64_t j, RowTotals<typename Read<E>::T>* totals) {
  using T = typename Read<E>::T;
  using V = typename Vectors<T>::V;
  constexpr int64_t kRowsAtATime = kRows * kRuns;
  const int64_t columns = j + kStrip < block.columns ? kStrip : block.columns - j;
  for (int64_t start = 0; start < block.rows; start += kRowsAtATime) {
    const int64_t end = start + kRowsAtATime < block.rows ? start + kRowsAtATime : block.rows;
    StripSums<T> strip = {};
    int64_t i = start;
    for (; i + kRows <= end; i += kRows) {
      int64_t down = kRows, right = 0;  // then the next strip, then the next block
      if (i + 2 * kRows > block.rows) {
        const bool last = j + kStrip >= block.columns;
        down = (last ? block.rows : 0) - i;
        right = last ? -j : kStrip;
      }
      add_tile<E, Mode, kRows>(tile_at<E, Mode>(block, i, j, down, right), columns, totals + i,
                               &strip);
    }
    for (; i < end; ++i) {
      add_tile<E, Mode, 1>(tile_at<E, Mode>(block, i, j, 0, kStrip), columns, totals + i, &strip);
    }
    const auto put = [&](double* to, Wide sum) {
      Wide* out = reinterpret_cast<Wide*>(to);
      *out = start == 0 ? sum : *out + sum;
    };
    for (int s = 0; s < Mode::kCount; ++s) {
      double* to = block.column_sums + s * block.column_stride + j;
      for (int64_t c = 0; c < columns; c += Vectors<T>::kLanes) {
        for (int part = 0; part < Vectors<T>::kParts; ++part) {
          const int64_t at = c + part * kWideLanes;
          put(to + at, s == kWg
                           ? *reinterpret_cast<const Wide*>(&strip.wg[at])
                           : Vectors<T>::part(*reinterpret_cast<const V*>(&strip.of[s][c]), part));
        }
      }
    }
  }
}

// All sums of a block. Without column sums row after row, as they lie in memory, else strip after
// strip. Both add the entries of a row in the same order.
template <class E, class Mode>
void sums_of(const ScoreBlock& block) {
  using T = typename Read<E>::T;
  // the columns that `runs` may hold; in double it may be more
  constexpr int64_t kMost = kRuns * kRun * Vectors<T>::kLanes;
  constexpr int64_t kLong = kMost > kStrip ? kMost : kStrip;
  static_assert(kLong % kStrip == 0, "");
  static_assert(sizeof(RowTotals<T>) <= kRowScratch * sizeof(double), "");
  if constexpr (Mode::kColumns) {
    RowTotals<T>* totals = reinterpret_cast<RowTotals<T>*>(block.scratch);
    __builtin_memset(block.scratch, 0, block.rows * sizeof(RowTotals<T>));
    for (int64_t j = 0; j < block.columns; j += kStrip) {
      add_strip<E, Mode>(block, j, totals);
      if ((j + kStrip) % kLong == 0) {
        for (int64_t i = 0; i < block.rows; ++i) totals[i].end_runs(Mode::kCount);
      }
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      totals[i].end_runs(Mode::kCount);
      totals[i].sum(block.row_sums + i * kStatistics);
    }
  } else {
    for (int64_t i = 0; i < block.rows; ++i) {
      RowTotals<T> totals = {};
      for (int64_t j = 0; j < block.columns; j += kLong) {
        const int64_t columns = j + kLong < block.columns ? kLong : block.columns - j;
        add_tile<E, Mode, 1>(tile_at<E, Mode>(block, i, j, 0, kAheadBytes / sizeof(E)), columns,
                             &totals, nullptr);
        totals.end_runs(Mode::kCount);
      }
      totals.sum(block.row_sums + i * kStatistics);
    }
  }
}

template <class E>
void sums(const ScoreBlock& block) {
  const bool columns = block.column_sums != nullptr;
  if (block.f != nullptr) {
    columns ? sums_of<E, Mode<true, true, true>>(block)
            : sums_of<E, Mode<true, true, false>>(block);
  } else if (block.g != nullptr) {
    columns ? sums_of<E, Mode<true, false, true>>(block)
            : sums_of<E, Mode<true, false, false>>(block);
  } else {
    columns ? sums_of<E, Mode<false, false, true>>(block)
            : sums_of<E, Mode<false, false, false>>(block);
  }
}

}  // namespace

extern const ScoreKernel score_kernels[kElements] = {&sums<float>, &sums<double>, &sums<Half>,
                                                     &sums<BFloat16>};

}  // namespace ORTHOREG_CPU_LEVEL
}  // namespace orthoreg::cpu
