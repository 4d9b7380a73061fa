// Grouped Gram matrices, with an entrywise epilogue.
//
// For every layer and group: G = W W^T or W^T W, then S = phi'(R) and the part of sum phi(R) that
// this tile holds (Penalty = Plain stores G itself). One block of 256 threads computes one 64 x 64
// tile of the lower triangle; blocks are numbered layer by layer, group by group (common/plan.h).
// It reads 64 rows of each factor, writes its tile and, off the diagonal, the mirror image.
//   cost: m^2 inner fused multiply-adds a matrix (half of G and the tiles' overhang), 2 m^2 stores
// Bitwise repeatable: a tile is summed by one block in one order, the parts are added in order of
// the blocks by finish_penalty.
#pragma once

#include "../common/entrywise.h"
#include "tiles.cuh"

namespace orthoreg::cuda {

struct Plain {};  // no penalty: G itself

constexpr int kSmall = 8;
static_assert(kSmall * kSmall == kTile);

template <class T, class Penalty>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gram_kernel(const __grid_constant__ Problems problems, T* __restrict__ out,
                double* __restrict__ parts) {  // parts: one a block, unused for Plain
  __shared__ Slabs<T> slabs;
  __shared__ double exact[kTile];  // the diagonal, or all of a small matrix
  const Problem& p = problems.layer[find_layer(problems, blockIdx.x)];
  const int m = gram_size(p), across = (m + kTile - 1) / kTile;
  const int triangle = across * (across + 1) / 2, unit = blockIdx.x - p.first_unit;
  const int group = unit / triangle;
  int row_tile = 0, column_tile = unit % triangle;
  while (column_tile > row_tile) column_tile -= ++row_tile;
  const int row = row_tile * kTile, column = column_tile * kTile;
  const bool on_diagonal = row_tile == column_tile;

  // Near orthonormality G - I cancels on the diagonal, so that is summed in double; and a matrix of
  // few pairs in all its entries, which may cancel without others to outweigh the error.
  const bool small = m <= kSmall;
  const int one = small ? threadIdx.x / kSmall : threadIdx.x;
  const int other = small ? threadIdx.x % kSmall : threadIdx.x;
  double product = 0;
  const auto add_exact = [&](const Slabs<T>& slab) {
    if (on_diagonal && threadIdx.x < kTile) {
      for (int q = 0; q < kSlab; ++q) {
        product += static_cast<double>(slab.a[q][one]) * static_cast<double>(slab.a[q][other]);
      }
    }
  };
  T sum[kPerThread][kPerThread] = {};
  const auto along = [&](int i, int q) {  // entry q of row i of the factor whose Gram this is
    return p.columns ? entry<T>(p, group, q, i) : entry<T>(p, group, i, q);
  };
  tile_product(
      slabs, p.columns ? p.n : p.width, /*a_along_inner=*/!p.columns, /*b_along_inner=*/!p.columns,
      [&](int i, int q) { return along(row + i, q); },
      [&](int q, int j) { return along(column + j, q); }, add_exact, sum);
  if (on_diagonal) {
    if (threadIdx.x < kTile) exact[threadIdx.x] = product;
    __syncthreads();
  }

  const int tx = threadIdx.x % kAcross, ty = threadIdx.x / kAcross;
  T* base = out + p.slopes + static_cast<int64_t>(group) * m * m;
  double part = 0;
#pragma unroll
  for (int x = 0; x < kPerThread; ++x) {
#pragma unroll
    for (int y = 0; y < kPerThread; ++y) {
      const int i = row + ty * kPerThread + x, j = column + tx * kPerThread + y;
      if (i >= m || j >= m) continue;
      const double entry = small    ? exact[i * kSmall + j]
                           : i == j ? exact[i - row]
                                    : static_cast<double>(sum[x][y]);
      T value = static_cast<T>(entry);
      if constexpr (!std::is_same_v<Penalty, Plain>) {
        if (i == j) value = Penalty::kIdentity ? static_cast<T>(entry - 1) : T(0);
        part += (on_diagonal ? 1 : 2) * static_cast<double>(Penalty::value(value));
        value = Penalty::slope(value);
      }
      base[static_cast<int64_t>(i) * m + j] = value;
      if (!on_diagonal) base[static_cast<int64_t>(j) * m + i] = value;
    }
  }
  if constexpr (!std::is_same_v<Penalty, Plain>) {
    __shared__ double scratch[kThreads / 32];
    part = block_sum<kThreads>(part, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = part;
  }
}

// values[l] = offset_l + the parts of layer l's blocks, in a fixed order. One block a layer.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_penalty_kernel(const __grid_constant__ Problems problems,
                          const double* __restrict__ parts, T* __restrict__ values) {
  __shared__ double scratch[kThreads / 32];
  const int layer = blockIdx.x;
  const int first = problems.layer[layer].first_unit;
  const int last =
      layer + 1 < problems.count ? problems.layer[layer + 1].first_unit : problems.units;
  double sum = 0;
  for (int unit = first + threadIdx.x; unit < last; unit += kThreads) sum += parts[unit];
  sum = block_sum<kThreads>(sum, scratch);
  if (threadIdx.x == 0) values[layer] = static_cast<T>(sum + problems.layer[layer].offset);
}

}  // namespace orthoreg::cuda
