// Fused filter scores: every criterion of every layer, over filters and input channels, from one
// read of weight and gradient. Two launches: partial sums over pieces of the weights, then scores.
#pragma once

#include "../common/score_plan.h"
#include "score_sums.cuh"

namespace orthoreg::cuda {

constexpr int kMaxScoreCriteria = 7;

struct SumProblem {  // see common/scores.h
  const void *weight, *grad;
  void* fisher;
  int64_t stride, grad_stride, fisher_stride;
  int64_t rows_at, columns_at;  // its partial sums in the workspace; < 0: not wanted
  int32_t groups, n, k;
  int32_t first_unit;  // its first block
  int16_t lanes, steps, row_slots, group_slots;
  int32_t aligned;  // 16 bytes at once
  Type type;
};

struct SumProblems {
  int32_t count;
  SumProblem layer[kScoreLayersPerLaunch];
};
static_assert(sizeof(SumProblem) <= 96);
static_assert(sizeof(SumProblems) <= (kScoreLayersPerLaunch > 36 ? 32764 - 64 : 4096 - 64),
              "kernel parameter space");

// Where a thread stands in its piece, and which of its columns is which.
template <class E>
struct Columns {
  int lane, lanes, first;
  bool aligned;

  static constexpr int kVector = 16 / sizeof(E);  // elements of a load
  __device__ __forceinline__ int local(int v) const {
    return aligned ? v / kVector * (lanes * kVector) + lane * kVector + v % kVector
                   : v * lanes + lane;
  }
};

// The columns of a thread in one row, as they lie in memory, zeros from column k on.
template <class E>
struct Entries {
  static constexpr int kVector = 16 / sizeof(E), kLoads = own_columns(sizeof(E)) / kVector;
  uint4 packed[kLoads];

  __device__ __forceinline__ void load(const void* data, int64_t start, bool inside, int k,
                                       const Columns<E>& at) {
    const E* row = static_cast<const E*>(data) + start;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (at.aligned) {
        const int column = at.first + at.local(i * kVector);
        packed[i] = inside && column < k ? load_16(row + column) : make_uint4(0, 0, 0, 0);
      } else {
        alignas(16) E piece[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const int column = at.first + at.local(i * kVector + e);
          piece[e] = inside && column < k ? row[column] : E(0);
        }
        packed[i] = *reinterpret_cast<const uint4*>(piece);
      }
    }
  }

  template <class T>
  __device__ __forceinline__ T get(int v) const {
    return widen<T>(reinterpret_cast<const E*>(packed)[v]);
  }
};

// F += g^2 for the columns of a thread in one row; returns the new F.
template <class T, class E, int kOwn>
__device__ __forceinline__ void add_squares(void* data, int64_t start, bool inside, int k,
                                            const Columns<E>& at, const Entries<E>& g,
                                            T (&out)[kOwn]) {
  T* row = static_cast<T*>(data) + start;
#pragma unroll
  for (int v = 0; v < kOwn; ++v) {
    const int column = at.first + at.local(v);
    if (inside && column < k) {
      const T entry = g.template get<T>(v);
      out[v] = multiply_add(entry, entry, row[column]);
      row[column] = out[v];
    }
  }
}

// The piece of a block. Per row, the sums of a thread's columns are added over the row's lanes by
// shuffles, several rows in one go. Per column, a thread adds up its rows in registers, and the row
// slots of a group meet in `scratch`.
template <class T, class E, int kMode, bool kColumns>
__device__ __forceinline__ void sum_piece(const SumProblem& p, int unit, T* work, double* scratch) {
  constexpr int kOwn = own_columns(sizeof(E)), kRows = own_rows(sizeof(E));
  const int column_blocks = (p.k + p.lanes * kOwn - 1) / (p.lanes * kOwn);
  const int rows_of_unit = p.row_slots * p.steps;
  const int row_blocks = (p.n + rows_of_unit - 1) / rows_of_unit;
  const int column_block = unit % column_blocks;
  const int row_block = unit / column_blocks % row_blocks;
  const int first_group = unit / column_blocks / row_blocks * p.group_slots;

  const int slot = threadIdx.x / p.lanes;  // row_slot + row_slots * group_slot
  const int group = first_group + slot / p.row_slots;
  const Columns<E> at{static_cast<int>(threadIdx.x) % p.lanes, p.lanes,
                      column_block * p.lanes * kOwn, p.aligned != 0};
  const int first_row = row_block * rows_of_unit;

  Sums<T, kMode> columns[kColumns ? kOwn : 1];
#pragma unroll 1
  for (int step = 0; step < p.steps; step += kRows) {
    if (first_row + step * p.row_slots >= p.n) break;  // the whole block
    Entries<E> w[kRows], g[kMode == kWeights ? 1 : kRows];
    int64_t rows[kRows];
    bool inside[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first_row + (step + r) * p.row_slots + slot % p.row_slots;
      inside[r] = row < p.n && group < p.groups;
      rows[r] = static_cast<int64_t>(group) * p.n + row;
      w[r].load(p.weight, rows[r] * p.stride, inside[r], p.k, at);
      if constexpr (kMode != kWeights) {
        g[r].load(p.grad, rows[r] * p.grad_stride, inside[r], p.k, at);
      }
    }
    Total<T, kMode> totals[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      T f[kOwn] = {};
      if constexpr (kMode == kFisherToo) {
        add_squares<T, E, kOwn>(p.fisher, rows[r] * p.fisher_stride, inside[r], p.k, at, g[r], f);
      }
      Sums<T, kMode> sums;
#pragma unroll
      for (int v = 0; v < kOwn; ++v) {
        T slope = T(0);
        if constexpr (kMode != kWeights) slope = g[r].template get<T>(v);
        const Terms<T, kMode, sizeof(E) == 2> terms(w[r].template get<T>(v), slope, f[v]);
        sums.add(terms);
        if constexpr (kColumns) columns[v].add(terms);
      }
      totals[r] = Total<T, kMode>(sums);
    }
    if (p.rows_at < 0) continue;  // the whole launch
    // each half of the lanes goes on with one of two rows, until a lane has one row left
    int apart = p.lanes, mine = 0;
#pragma unroll
    for (int left = kRows / 2; left > 0; left /= 2) {
      apart /= 2;
      const bool upper = (at.lane & apart) != 0;
#pragma unroll
      for (int r = 0; r < left; ++r) totals[r].merge(totals[r + left], upper, apart);
      mine += upper ? left : 0;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      if (offset < apart) totals[0].add_from(offset);
    }
    const int row = first_row + (step + mine) * p.row_slots + slot % p.row_slots;
    if (at.lane % apart == 0 && row < p.n && group < p.groups) {
      const int64_t partial = (static_cast<int64_t>(group) * p.n + row) * column_blocks;
      totals[0].write(work + p.rows_at + (partial + column_block) * kRowSlots);
    }
  }
  if constexpr (kColumns) {
    if (p.columns_at < 0) return;
    // [slot][column]: thread t goes on with column t % width, t + 256, ...
    const int width = p.lanes * kOwn;
    const auto reduce = [&](int statistic, const auto& value, auto zero) {
      using S = decltype(zero);
      S* held = reinterpret_cast<S*>(scratch);
      __syncthreads();  // of the statistic before
#pragma unroll
      for (int v = 0; v < kOwn; ++v) held[slot * width + at.local(v)] = value(columns[v]);
      __syncthreads();
#pragma unroll 1
      for (int e = threadIdx.x; e < p.group_slots * width; e += kScoreThreads) {
        const int g = first_group + e / width, column = at.first + e % width;
        S sum = 0;
#pragma unroll 1
        for (int y = 0; y < p.row_slots; ++y) {
          sum += held[(e / width * p.row_slots + y) * width + e % width];
        }
        if (g >= p.groups || column >= p.k) continue;
        T* to =
            work + p.columns_at +
            ((static_cast<int64_t>(g) * row_blocks + row_block) * kStatistics<kMode> + statistic) *
                p.k +
            column;
        *to = static_cast<T>(sum);
        if (statistic == 4) to[p.k] = rest_of(static_cast<double>(sum), *to);
      }
    };
    reduce(0, [](const auto& s) { return s.abs_w; }, T(0));
    reduce(1, [](const auto& s) { return s.square_w; }, T(0));
    if constexpr (kMode != kWeights) {
      reduce(2, [](const auto& s) { return s.abs_wg; }, T(0));
      reduce(3, [](const auto& s) { return s.square_wg; }, T(0));
      reduce(4, [](const auto& s) { return s.wg(); }, 0.0);  // and 5, the rest
    }
    if constexpr (kMode == kFisherToo) {
      reduce(6, [](const auto& s) { return s.square_w_fisher; }, T(0));
    }
  }
}

// The partial sums of all layers of a launch.
//   grid: the units of score_plan.h, column blocks fastest, so that blocks that run together read
//     neighbouring memory; block: kScoreThreads
//   reads w and g once, 16 bytes a load and own_rows() rows a thread ahead of their use;
//     kFisherToo reads and writes F once
//   writes some 3 % of that: rows 32 bytes for each 2 KB, columns 24 for each 512 in a large layer
//   right because an entry belongs to one thread of one block, and every sum has a fixed order;
//     barriers only between the writing and the reading of `scratch`
template <class T, int kMode, bool kColumns>
__global__ void __launch_bounds__(kScoreThreads, kColumns ? (kMode == kFisherToo ? 1 : 2) : 2)
    score_sums_kernel(const __grid_constant__ SumProblems problems, T* __restrict__ work) {
  __shared__ double scratch[kColumns ? kScoreThreads * (sizeof(T) == 8 ? 4 : 8) : 1];
  const SumProblem& p = problems.layer[find_layer(problems, blockIdx.x)];
  const int unit = blockIdx.x - p.first_unit;
  if constexpr (sizeof(T) == 8) {
    sum_piece<T, double, kMode, kColumns>(p, unit, work, scratch);
  } else {
    switch (p.type) {
      case Type::kHalf:
        return sum_piece<T, __half, kMode, kColumns>(p, unit, work, scratch);
      case Type::kBFloat16:
        return sum_piece<T, __nv_bfloat16, kMode, kColumns>(p, unit, work, scratch);
      default:
        return sum_piece<T, float, kMode, kColumns>(p, unit, work, scratch);
    }
  }
}

struct FinishProblem {
  const void *bias, *bias_grad;
  int64_t rows_at, columns_at;     // as in SumProblem
  int64_t first, first_inputs;     // where its scores start in each row of the output
  int32_t rows, column_blocks;     // filters of all groups
  int32_t inputs, taps, k;         // of a group
  int32_t row_blocks, all_inputs;  // of a group; of all groups
  int32_t first_unit;              // its first block
  int32_t channels_last;
  Type type;
};

struct FinishProblems {
  int32_t count, criteria;
  int32_t criterion[kMaxScoreCriteria];
  FinishProblem layer[kScoreLayersPerLaunch];
};
static_assert(sizeof(FinishProblems) <= (kScoreLayersPerLaunch > 36 ? 32764 - 64 : 4096 - 64),
              "kernel parameter space");

// The blocks of a layer in the second launch: first those of its filters, then those of its inputs.
constexpr int64_t finish_units(int64_t rows, int64_t inputs) {
  return divide_up(rows, kFinishedAtOnce) + divide_up(inputs, kFinishedAtOnce);
}

// The scores: adds up the partial sums of a filter over the column blocks, with its bias, or those
// of an input channel over the row blocks of its group and its taps.
//   block: kFinishedAtOnce scores, 8 neighbouring lanes each, which take every eighth partial sum
//     and meet by shuffles, all in double and in a fixed order
//   reads what the first launch wrote, mostly from the L2 cache; writes one number a criterion
template <class T, int kMode>
__global__ void __launch_bounds__(kScoreThreads)
    finish_scores_kernel(const __grid_constant__ FinishProblems problems,
                         const T* __restrict__ work, T* __restrict__ out, int64_t total) {
  constexpr int kParts = kScoreThreads / kFinishedAtOnce;
  const FinishProblem& p = problems.layer[find_layer(problems, blockIdx.x)];
  const int row_units = p.rows_at < 0 ? 0 : (p.rows + kFinishedAtOnce - 1) / kFinishedAtOnce;
  const int unit = blockIdx.x - p.first_unit, part = threadIdx.x % kParts;
  const bool is_row = unit < row_units;
  const int index = (is_row ? unit : unit - row_units) * kFinishedAtOnce + threadIdx.x / kParts;
  const bool inside = index < (is_row ? p.rows : p.all_inputs);

  double sums[kStatistics<kMode>] = {};
  if (inside && is_row) {
    const T* from = work + p.rows_at + static_cast<int64_t>(index) * p.column_blocks * kRowSlots;
#pragma unroll 1
    for (int e = part; e < p.column_blocks; e += kParts) {
#pragma unroll
      for (int s = 0; s < kStatistics<kMode>; ++s) sums[s] += from[e * kRowSlots + s];
    }
    if (p.bias != nullptr && part == 0) {
      const double b = load<T>(p.bias, index, p.type);
      sums[0] += b < 0 ? -b : b;
      sums[1] += b * b;
      if constexpr (kMode != kWeights) {
        const double product = b * load<T>(p.bias_grad, index, p.type);
        sums[2] += product < 0 ? -product : product;
        sums[3] += product * product;
        sums[4] += product;
      }
    }
  } else if (inside) {
    const int group = index / p.inputs, channel = index % p.inputs;
    const int first = p.channels_last ? channel : channel * p.taps;
    const int step = p.channels_last ? p.inputs : 1;
    const T* from = work + p.columns_at +
                    static_cast<int64_t>(group) * p.row_blocks * kStatistics<kMode> * p.k + first;
#pragma unroll 2
    for (int e = part; e < p.row_blocks * p.taps; e += kParts) {
      const int64_t block = e / p.taps, tap = e % p.taps;
#pragma unroll
      for (int s = 0; s < kStatistics<kMode>; ++s) {
        sums[s] += from[(block * kStatistics<kMode> + s) * p.k + tap * step];
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kStatistics<kMode>; ++s) {
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2) {
      sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], offset);
    }
  }
  if (!inside || part != 0) return;
  // in the order of Criterion in common/scores.h
  double scores[kMaxScoreCriteria] = {sums[0], sqrt(sums[1])};
  if constexpr (kMode != kWeights) {
    const double wg = sums[4] + sums[5];
    scores[2] = wg < 0 ? -wg : wg;
    scores[3] = sums[3];
    scores[4] = sums[2];
    scores[5] = wg * wg;
  }
  if constexpr (kMode == kFisherToo) scores[6] = sums[6];
  const int64_t at = (is_row ? p.first : p.first_inputs) + index;
#pragma unroll 1
  for (int c = 0; c < problems.criteria; ++c) {
    double score = 0;
#pragma unroll
    for (int which = 0; which < kMaxScoreCriteria; ++which) {
      if (problems.criterion[c] == which) score = scores[which];
    }
    out[c * total + at] = static_cast<T>(score);
  }
}

}  // namespace orthoreg::cuda
