// Grouped gradients: 2 c_l S W (rows) or 2 c_l W S (columns) for all layers.
//
// One block of 256 threads computes one 64 x 64 tile of one layer's [n, width] gradient, the bias
// being the last column, and stores it or, with kAccumulate, adds it. The coefficients c_l stay on
// the device.
//   cost: n width m fused multiply-adds a matrix; S and W are read once a tile row and column
#pragma once

#include "tiles.cuh"

namespace orthoreg::cuda {

template <class T, bool kAccumulate>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gram_penalty_grad_kernel(const __grid_constant__ Problems problems,
                             const T* __restrict__ slopes, const T* __restrict__ coefficients) {
  __shared__ Slabs<T> slabs;
  const int layer = find_layer(problems, blockIdx.x);
  const Problem& p = problems.layer[layer];
  const int down = (p.n + kTile - 1) / kTile, across = (p.width + kTile - 1) / kTile;
  const int unit = blockIdx.x - p.first_unit;
  const int group = unit / (down * across);
  const int row = unit / across % down * kTile, column = unit % across * kTile;
  const int m = gram_size(p);
  const T* s = slopes + p.slopes + static_cast<int64_t>(group) * m * m;
  const auto slope = [&](int i, int j) {
    return i < m && j < m ? s[static_cast<int64_t>(i) * m + j] : T(0);
  };

  T sum[kPerThread][kPerThread] = {};
  tile_product(
      slabs, m, /*a_along_inner=*/true, /*b_along_inner=*/false,
      [&](int i, int q) { return p.columns ? entry<T>(p, group, row + i, q) : slope(row + i, q); },
      [&](int q, int j) {
        return p.columns ? slope(q, column + j) : entry<T>(p, group, q, column + j);
      },
      [](const Slabs<T>&) {}, sum);

  const T factor = 2 * coefficients[layer];
  const int tx = threadIdx.x % kAcross, ty = threadIdx.x / kAcross;
#pragma unroll
  for (int x = 0; x < kPerThread; ++x) {
#pragma unroll
    for (int y = 0; y < kPerThread; ++y) {
      const int i = row + ty * kPerThread + x, j = column + tx * kPerThread + y;
      if (i >= p.n || j >= p.width) continue;
      const int64_t filter = static_cast<int64_t>(group) * p.n + i;
      void* target = j < p.k ? p.grad : p.bias_grad;
      const int64_t at = j < p.k ? filter * p.grad_stride + j : filter;
      const T before = kAccumulate ? load<T>(target, at, p.type) : T(0);
      store<T>(target, at, p.type, before + factor * sum[x][y]);
    }
  }
}

}  // namespace orthoreg::cuda
