// A tile of a product on tensor cores: 3xTF32 (as good as float32), TF32 or bfloat16.
#pragma once

#include "../common/precision.h"
#include "problem.cuh"

namespace orthoreg::cuda {

// A warp owns [16 kDown, 8 kRight] sums, kWarpsDown x kWarpsRight warps a tile.
template <int kTile, Product kProduct>
struct TensorShape;
template <Product kProduct>
struct TensorShape<32, kProduct> {
  static constexpr int kWarpsDown = 2, kWarpsRight = 2, kStages = 4, kBlocksPerSm = 4;
};
template <Product kProduct>
struct TensorShape<64, kProduct> {
  static constexpr int kWarpsDown = 2, kWarpsRight = 2, kStages = 3, kBlocksPerSm = 4;
};
template <Product kProduct>
struct TensorShape<128,
                   kProduct> {  // one product a step: fewer, larger warps' tiles halve the loads
  static constexpr bool kOne = kProduct != Product::kTf32x3;
  static constexpr int kWarpsDown = kOne ? 2 : 4, kWarpsRight = 4, kStages = 3;
  static constexpr int kBlocksPerSm = kOne ? 2 : 1;
};

// One block computes kTile x kTile sums. Panels of kDepth inner entries of both operands pass
// through a ring of kStages in shared memory, filled by cp.async kStages - 1 ahead.
//   cost of an inner entry: kTile^2 multiply-adds (three times on the tensor cores with 3xTF32),
//   2 kTile loads from L2, half of them where both panels are the same (diagonal tiles)
//
// Precision. A TF32 has 11 significant bits. 3xTF32 cuts x into big + small, big a TF32 and small
// the exact rest, of which the hardware drops what is below 2^-20 x, and sums small big + big small
// + big big; what is lost is proportional to each product, up to 2^-19 of it. Tensor cores cut off
// what they add, always towards zero; so after each panel their sums are added to a second set of
// sums in plain float, rounded to nearest.
//
// Layout in shared memory. An operand that is contiguous along the inner dimension lies as [kTile]
// [kDepth] with chunk c (4 entries) of row r in the place of chunk c ^ 2 (r % 4); one that is
// contiguous along the tile as [kDepth][kTile], entry i of row q in the place of i ^ 8 (q / 2 % 4).
// A thread of a warp (group g = lane / 4, t = lane % 4) multiplies inner entries 2t and 2t + 1 of
// each 8 where mma_tf32 speaks of t and t + 4: the order of a sum's entries is free as long as both
// operands agree. So the first layout is read by 64-bit loads, and neither has bank conflicts.
template <int kTile_, Product kProduct>
struct TensorTile {
  using Number = float;
  using Shape = TensorShape<kTile_, kProduct>;
  static constexpr int kTile = kTile_;
  static constexpr int kWarpsRight = Shape::kWarpsRight, kStages = Shape::kStages;
  static constexpr int kThreads = Shape::kWarpsDown * kWarpsRight * 32;
  static constexpr int kBlocksPerSm = Shape::kBlocksPerSm;
  static constexpr int kDepth = static_cast<int>(orthoreg::kDepth);
  static constexpr int kPanel = kTile * kDepth;
  static constexpr int kSharedBytes = kStages * 2 * kPanel * static_cast<int>(sizeof(float));
  static constexpr int kDown = kTile / Shape::kWarpsDown / 16, kRight = kTile / kWarpsRight / 8;
  static constexpr bool kSplit = kProduct == Product::kTf32x3;
  using Sums = float[kDown][kRight][4];

  static __device__ __forceinline__ int place_along(int r, int q) {
    return r * kDepth + (((q >> 2) ^ ((r & 3) << 1)) << 2) + (q & 3);
  }
  static __device__ __forceinline__ int place_across(int r, int q) {
    return q * kTile + (r ^ (((q >> 1) & 3) << 3));
  }

  // Entry (r, q) of a panel in shared memory.
  template <bool kAlong>
  struct Panel {
    const float* data;
    // A permutation of the inner entries that lets the threads of a warp, each with a row of its
    // own, read without bank conflicts.
    __device__ __forceinline__ int turn(int q) const {
      return kAlong ? q ^ (threadIdx.x >> 2 & 7) : q;
    }
    __device__ __forceinline__ float operator()(int r, int q) const {
      return data[kAlong ? place_along(r, q) : place_across(r, q)];
    }
  };

  // See SimtTile::multiply. same: the panels of A and B are the same, and one of them is loaded.
  // Step s: wait until its panels are there (this thread's, then by the barrier everyone's); refill
  // the stage that step s - 1 has read, which the same barrier says is over; compute. The steps
  // before 0 fill the ring.
  template <bool kAlongA, bool kAlongB, class EachPanel>
  static __device__ __forceinline__ void multiply(char* shared, const Matrix& a, int first_a,
                                                  const Matrix& b, int first_b, bool same,
                                                  int begin, int end, const EachPanel& each_panel,
                                                  Sums& sums) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    float* ring = reinterpret_cast<float*>(shared);
    const bool wide_a = is_wide(a), wide_b = is_wide(b);
    const int steps = (end - begin + kDepth - 1) / kDepth;
    const auto fill_stage = [&](int step) {
      if (step < steps) {
        float* panels = ring + step % kStages * 2 * kPanel;
        const int start = begin + step * kDepth;
        fill<kAlongA>(panels, a, first_a, start, end, wide_a);
        if (!same) fill<kAlongB>(panels + kPanel, b, first_b, start, end, wide_b);
      }
      commit_copies();
    };
#pragma unroll 1
    for (int step = 1 - kStages; step < steps; ++step) {
      if (step >= 0) {
        wait_copies<kStages - 2>();
        __syncthreads();
      }
      fill_stage(step + kStages - 1);
      if (step < 0) continue;
      const float* panel_a = ring + step % kStages * 2 * kPanel;
      const float* panel_b = same ? panel_a : panel_a + kPanel;
      if constexpr (kSplit) {
        Sums recent = {};
        multiply_panels<kAlongA, kAlongB>(panel_a, panel_b, recent);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
          for (int j = 0; j < kRight; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][j][e] += recent[i][j][e];
          }
        }
      } else {
        multiply_panels<kAlongA, kAlongB>(panel_a, panel_b, sums);
      }
      each_panel(Panel<kAlongA>{panel_a}, kDepth);
    }
    __syncthreads();  // shared memory is free again
#else
    __trap();  // the launcher takes SimtTile
#endif
  }

  // Calls visit(row, column, sum) for the sums of this thread.
  template <class Visit>
  static __device__ __forceinline__ void for_each(const Sums& sums, const Visit& visit) {
    const int row = first_row() + threadIdx.x % 32 / 4, column = first_column();
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kRight; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          visit(row + 16 * i + e / 2 * 8, column + 8 * j + threadIdx.x % 4 * 2 + e % 2,
                sums[i][j][e]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int first_row() {
    return threadIdx.x / 32 / kWarpsRight * 16 * kDown;
  }
  static __device__ __forceinline__ int first_column() {
    return threadIdx.x / 32 % kWarpsRight * 8 * kRight;
  }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  // Whether four neighbouring entries, from a multiple of four on, can be read at once.
  static __device__ __forceinline__ bool is_wide(const Matrix& matrix) {
    const int bytes = matrix.type == Type::kFloat ? 16 : 8;
    return matrix.stride % 4 == 0 && reinterpret_cast<uintptr_t>(matrix.data) % bytes == 0;
  }

  // Starts the copy of one panel: inner entries [start, start + kDepth), 0 from `end` on, of the
  // kTile rows (kAlong) or columns from `first` on.
  template <bool kAlong>
  static __device__ __forceinline__ void fill(float* panel, const Matrix& matrix, int first,
                                              int start, int end, bool wide) {
    constexpr int kAcross = (kAlong ? kDepth : kTile) / 4;  // chunks of a row of the matrix
    const int row_end = min(matrix.rows, kAlong ? matrix.rows : end);
    const int column_end = min(matrix.width(), kAlong ? end : matrix.width());
    const int row = kAlong ? first : start, column = kAlong ? start : first;
    const bool whole = wide && matrix.type == Type::kFloat && matrix.dropped == nullptr &&
                       column + kAcross * 4 <= min(matrix.columns, column_end);
    if (whole) {
      // each round is kRows rows further, in memory and in the panel, whose layout repeats by then
      constexpr int kRows = kThreads / kAcross, kRounds = kPanel / 4 / kThreads;
      constexpr int kRound = kRows * (kAlong ? kDepth : kTile);
      static_assert(kRows % 8 == 0 && kRounds * kRows * kAcross * 4 == kPanel);
      const int i = threadIdx.x / kAcross, j = threadIdx.x % kAcross * 4;
      float* to = panel + (kAlong ? place_along(i, j) : place_across(j, i));
      const float* from =
          static_cast<const float*>(matrix.data) + (row + i) * matrix.stride + column + j;
      const int left = row_end - row - i;
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const bool inside = round * kRows < left;
        copy_async_16(to + round * kRound, inside ? from : matrix.data, inside ? 16 : 0);
        from += kRows * matrix.stride;
      }
      return;
    }
#pragma unroll 1
    for (int x = threadIdx.x; x < kPanel / 4; x += kThreads) {
      const int i = x / kAcross, j = x % kAcross * 4;
      fill_chunk(panel + (kAlong ? place_along(i, j) : place_across(j, i)), matrix, row + i,
                 column + j, row + i < row_end && matrix.has_row(row + i), column_end, wide);
    }
  }

  // Four entries at an edge, of another type than float, or without alignment.
  static __device__ __forceinline__ void fill_chunk(float* to, const Matrix& matrix, int row,
                                                    int column, bool inside, int column_end,
                                                    bool wide) {
    const bool whole = inside && wide && column + 4 <= min(matrix.columns, column_end);
    if (whole && matrix.type == Type::kFloat) {
      copy_async_16(to, static_cast<const float*>(matrix.data) + row * matrix.stride + column, 16);
    } else if (whole) {
      *reinterpret_cast<float4*>(to) =
          load4(matrix.data, row * matrix.stride + column, matrix.type);
    } else {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const bool there = inside && column + e < column_end;
        if (matrix.type == Type::kFloat) {
          const float* from = static_cast<const float*>(matrix.data);
          if (there) {
            from = column + e < matrix.columns ? from + row * matrix.stride + column + e
                                               : static_cast<const float*>(matrix.last) + row;
          }
          copy_async_4(to + e, from, there ? 4 : 0);
        } else {
          to[e] = there ? matrix.template entry<float>(row, column + e) : 0.0f;
        }
      }
    }
  }

  // Inner entries 8 step + 2t and + 2t + 1 of row r of a panel, r % 8 = g.
  template <bool kAlong>
  static __device__ __forceinline__ float2 pair(const float* panel, int r, int step) {
    const int q = step * 8 + threadIdx.x % 4 * 2;
    if constexpr (kAlong) {
      return *reinterpret_cast<const float2*>(panel + place_along(r, q));
    } else {
      return {panel[place_across(r, q)], panel[place_across(r, q + 1)]};
    }
  }

  template <bool kAlongA, bool kAlongB>
  static __device__ __forceinline__ void multiply_panels(const float* panel_a, const float* panel_b,
                                                         Sums& sums) {
    const int g = threadIdx.x % 32 / 4, row = first_row() + g, column = first_column() + g;
    if constexpr (kProduct == Product::kBf16) {
#pragma unroll 1
      for (int step = 0; step < kDepth / 8; step += 2) {
        uint32_t right[kRight][2];
#pragma unroll
        for (int j = 0; j < kRight; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 p = pair<kAlongB>(panel_b, column + 8 * j, step + e);
            right[j][e] = pack_bf16(p.x, p.y);
          }
        }
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          uint32_t left[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 p = pair<kAlongA>(panel_a, row + 16 * i + e % 2 * 8, step + e / 2);
            left[e] = pack_bf16(p.x, p.y);
          }
#pragma unroll
          for (int j = 0; j < kRight; ++j) mma_bf16(sums[i][j], left, right[j]);
        }
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < kDepth / 8; ++step) {
        float2 right[kRight];
#pragma unroll
        for (int j = 0; j < kRight; ++j) right[j] = pair<kAlongB>(panel_b, column + 8 * j, step);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          const float2 upper = pair<kAlongA>(panel_a, row + 16 * i, step);
          const float2 lower = pair<kAlongA>(panel_a, row + 16 * i + 8, step);
          uint32_t left[4] = {big(upper.x), big(lower.x), big(upper.y), big(lower.y)};
          if constexpr (kSplit) {
            const uint32_t left_small[4] = {small(upper.x), small(lower.x), small(upper.y),
                                            small(lower.y)};
#pragma unroll
            for (int j = 0; j < kRight; ++j) {
              const uint32_t right_big[2] = {big(right[j].x), big(right[j].y)};
              const uint32_t right_small[2] = {small(right[j].x), small(right[j].y)};
              mma_tf32(sums[i][j], left_small, right_big);
              mma_tf32(sums[i][j], left, right_small);
              mma_tf32(sums[i][j], left, right_big);
            }
          } else {
#pragma unroll
            for (int j = 0; j < kRight; ++j) {
              const uint32_t right_big[2] = {big(right[j].x), big(right[j].y)};
              mma_tf32(sums[i][j], left, right_big);
            }
          }
        }
      }
    }
  }

  // The TF32 part of a number: cut off where the rest is used as well, else the nearest.
  static __device__ __forceinline__ uint32_t big(float x) {
    return kSplit ? __float_as_uint(x) & 0xffffe000u : to_tf32(x);
  }
  static __device__ __forceinline__ uint32_t small(float x) {
    return __float_as_uint(x - __uint_as_float(big(x)));
  }
#endif
};

}  // namespace orthoreg::cuda
