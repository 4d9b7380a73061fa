// From Gram matrices to S of the penalties on their cosines (see kCosines in common/entrywise.h).
//
// With d_i = sqrt(G_ii) and C_ij = G_ij / (d_i d_j):  S_ij = phi'(C_ij) / (d_i d_j)  for i != j,
// and S_ii = -sum_{j != i} phi'(C_ij) C_ij / d_i^2. One warp a row, in place: it reads and writes
// its row and reads all 1 / d, which are 0 for rows of zeros. Every entry is formed in double and
// the same in both triangles; m^2 entries a matrix, little beside the m^2 inner of its products.
#pragma once

#include "../common/entrywise.h"
#include "problem.cuh"

namespace orthoreg::cuda {

template <class T>
__device__ __forceinline__ double inverse_root(double square) {
  return square < kSmallestSquare<T> ? 0 : rsqrt(square);
}

// Turns row i of G into row i of S; returns its part of sum phi(C) in every lane of the warp.
// inverse: 1 / d of all m rows.
template <class T>
__device__ __forceinline__ double cosine_row(int penalty, T* row, int i, int m,
                                             const double* inverse) {
  double part = 0, turn = 0;
  Penalties::visit(penalty, [&](auto functor) {
    using Penalty = decltype(functor);
    if constexpr (Penalty::kCosines) {
      const double mine = inverse[i];
      for (int j = threadIdx.x % 32; j < m; j += 32) {
        if (j == i) continue;
        const double scale = mine * inverse[j], cosine = row[j] * scale;
        const double slope = Penalty::slope(cosine);
        part += Penalty::value(cosine);
        turn += slope * cosine;
        row[j] = static_cast<T>(slope * scale);
      }
      turn = warp_sum(turn);
      if (threadIdx.x % 32 == 0) row[i] = static_cast<T>(-turn * mine * mine);
    }
  });
  return warp_sum(part);
}

// All rows of one matrix, by a whole block; the penalty in thread 0.
template <int kThreads, class T>
__device__ __forceinline__ double cosine_rows(int penalty, T* matrix, int stride, int m,
                                              const double* inverse, double* scratch) {
  double value = 0;
  for (int i = threadIdx.x / 32; i < m; i += kThreads / 32) {
    value += cosine_row(penalty, matrix + static_cast<int64_t>(i) * stride, i, m, inverse);
  }
  return block_sum<kThreads>(threadIdx.x % 32 == 0 ? value : 0, scratch);
}

// slopes: G of all layers, and S afterwards. rows: 1 / d of every row of all layers, from
// first_part of each layer on, and after all of them (`count`) the rows' parts of the penalty.
template <class T>
__global__ void __launch_bounds__(32 * kRowsOfBlock)
    cosine_kernel(const __grid_constant__ Problems problems, T* __restrict__ slopes,
                  double* __restrict__ rows, int64_t count) {
  const Problem& p = problems.layer[find_layer(problems, blockIdx.x)];
  const int m = gram_size(p);
  const int row = (blockIdx.x - p.first_unit) * kRowsOfBlock + threadIdx.x / 32;
  if (row >= p.groups * m) return;
  const int group = row / m, i = row % m;
  T* mine = slopes + slopes_at(p, group) + static_cast<int64_t>(i) * p.slope_stride;
  const double part = cosine_row(problems.penalty, mine, i, m,
                                 rows + p.first_part + static_cast<int64_t>(group) * m);
  if (threadIdx.x % 32 == 0) rows[count + p.first_part + row] = part;
}

}  // namespace orthoreg::cuda
