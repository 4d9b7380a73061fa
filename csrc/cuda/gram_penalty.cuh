// Grouped gradients: 2 c_l S W (rows) or 2 c_l W S (columns) for all layers, with c_l / (2 P_l) for
// c_l where the penalty P_l is a root, and the kernel that
// does everything for small layers; Tile is SimtTile or TensorTile.
//
// A unit is one tile of one layer's [n, width] gradient, the bias being the last column; blocks
// take units in turns. The coefficients c_l stay on the device.
//   cost: n width m multiply-adds a matrix; S and W are read once a tile row and column, the
//   gradient is written or, with `accumulate`, read and written once
#pragma once

#include "gram.cuh"

namespace orthoreg::cuda {

template <class Tile>
constexpr int kGradStride = Tile::kTile + 4;  // rows of 16-byte chunks
template <class Tile>
constexpr int kGradTileBytes =
    Tile::kTile * kGradStride<Tile> * static_cast<int>(sizeof(typename Tile::Number));
template <class Tile>
constexpr int kGradSharedBytes =
    Tile::kSharedBytes > kGradTileBytes<Tile> ? Tile::kSharedBytes : kGradTileBytes<Tile>;
template <class Tile>
constexpr int kFusedSharedBytes =
    kGramSharedBytes<Tile> > kGradSharedBytes<Tile> ? kGramSharedBytes<Tile>
                                                    : kGradSharedBytes<Tile>;

// Four neighbouring entries of one row of the gradient, from column j on.
template <class T>
__device__ __forceinline__ void put4(const Problem& p, int64_t filter, int j, T factor,
                                     const T* __restrict__ sums, bool accumulate) {
  const int64_t at = filter * p.grad_stride + j;
  if constexpr (sizeof(T) == 4) {
    float* to = static_cast<float*>(p.grad) + at;
    if (p.type == Type::kFloat && j + 4 <= p.k && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      float4 all = accumulate ? *reinterpret_cast<const float4*>(to) : float4{0, 0, 0, 0};
      const float4 more = *reinterpret_cast<const float4*>(sums);
      all.x += factor * more.x;
      all.y += factor * more.y;
      all.z += factor * more.z;
      all.w += factor * more.w;
      *reinterpret_cast<float4*>(to) = all;
      return;
    }
  }
#pragma unroll 1
  for (int e = 0; e < 4 && j + e < width(p); ++e) {
    const bool bias = j + e >= p.k;
    void* to = bias ? p.bias_grad : p.grad;
    const int64_t where = bias ? filter : at + e;
    const T before = accumulate ? load<T>(to, where, p.type) : T(0);
    store<T>(to, where, p.type, before + factor * sums[e]);
  }
}

// The tile-th tile of a layer's gradient, group after group, given S of its group.
//   coefficient: the layer's;  root: null, or its penalty, if that is a root
template <class Tile>
__device__ __forceinline__ void grad_tile(const Problem& p, int tile,
                                          const typename Tile::Number* slopes,
                                          const typename Tile::Number* coefficient,
                                          const typename Tile::Number* root, bool accumulate,
                                          char* shared) {
  using Number = typename Tile::Number;
  __shared__ Matrix w, s;  // not in registers, which the sums need
  __shared__ int row, column, group;
  if (threadIdx.x == 0) {
    const int down = (p.n + Tile::kTile - 1) / Tile::kTile;
    const int across = (width(p) + Tile::kTile - 1) / Tile::kTile;
    group = tile / (down * across);
    row = tile / across % down * Tile::kTile;
    column = tile % across * Tile::kTile;
    w = filters(p, group);
    s = slope_matrix(p, slopes);
  }
  __syncthreads();
  const auto ignore = [](const auto&, int) {};
  typename Tile::Sums sums = {};
  if (p.columns) {  // S is symmetric: its rows serve as its columns
    Tile::template multiply<true, true>(shared, w, row, s, column, false, 0, gram_size(p), ignore,
                                        sums);
  } else {
    Tile::template multiply<true, false>(shared, s, row, w, column, false, 0, gram_size(p), ignore,
                                         sums);
  }
  Number* sum = reinterpret_cast<Number*>(shared);
  Tile::for_each(sums, [&](int i, int j, Number value) { sum[i * kGradStride<Tile> + j] = value; });
  __syncthreads();
  const Number factor = gradient_factor(*coefficient, root);
  const int64_t first = static_cast<int64_t>(group) * p.n;
#pragma unroll 1
  for (int e = threadIdx.x; e < Tile::kTile * Tile::kTile / 4; e += Tile::kThreads) {
    const int i = e / (Tile::kTile / 4), j = e % (Tile::kTile / 4) * 4;
    if (row + i >= p.n || column + j >= width(p)) continue;
    put4(p, first + row + i, column + j, factor, sum + i * kGradStride<Tile> + j, accumulate);
  }
  __syncthreads();  // shared memory is free again
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    gram_penalty_grad_kernel(const __grid_constant__ Problems problems,
                             const typename Tile::Number* __restrict__ slopes,
                             const typename Tile::Number* __restrict__ coefficients,
                             const typename Tile::Number* __restrict__ roots, bool accumulate) {
  extern __shared__ __align__(128) char shared[];
  for (int unit = blockIdx.x; unit < problems.units; unit += gridDim.x) {
    const Problem& p = problems.layer[find_layer(problems, unit)];
    const int tile = unit - p.first_unit, tiles_of_group = p.units / p.groups;
    grad_tile<Tile>(p, tile, slopes + slopes_at(p, tile / tiles_of_group), coefficients + p.index,
                    roots == nullptr ? nullptr : roots + p.index, accumulate, shared);
  }
}

// Layers of one group whose Gram matrix is one tile: penalty and gradient in one launch, for
// networks so small that launches are what they cost. Several blocks share a layer's gradient; each
// forms the Gram matrix itself, which is cheaper than to wait for another one.
//   slopes: one [m, m] a block; values [L], of which the first block of each layer writes one
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    fused_gram_penalty_kernel(const __grid_constant__ Problems problems,
                              typename Tile::Number* slopes,
                              const typename Tile::Number* __restrict__ coefficients,
                              typename Tile::Number* __restrict__ values) {
  using Number = typename Tile::Number;
  extern __shared__ __align__(128) char shared[];
  __shared__ double exact[kExact<Tile>], inverse[Tile::kTile], scratch[Tile::kThreads / 32];
  __shared__ int share, tiles;  // these are not in registers, which the sums need
  __shared__ Number* mine;
  const Problem& p = problems.layer[find_layer(problems, blockIdx.x)];
  if (threadIdx.x == 0) {
    share = blockIdx.x - p.first_unit;
    mine = slopes + slopes_at(p, share);
    tiles = (p.n + Tile::kTile - 1) / Tile::kTile * ((width(p) + Tile::kTile - 1) / Tile::kTile);
  }
  const GramTile all{0, 0, 0, 0, 0};
  form_gram_tile<Tile>(p, all, shared, exact);
  double value = finish_gram_tile<Tile>(p, all, problems.penalty, shared, exact, mine, inverse);
  if (Penalties::takes_cosines(problems.penalty)) {
    __syncthreads();
    value = cosine_rows<Tile::kThreads>(problems.penalty, mine, p.slope_stride, gram_size(p),
                                        inverse, scratch);
  }
  __shared__ Number penalty;
  if (threadIdx.x == 0) {
    value += p.offset;
    penalty = static_cast<Number>(Penalties::takes_root(problems.penalty) ? sqrt(value) : value);
    if (share == 0) values[p.index] = penalty;
  }
  // S goes through global memory (and stays in L2), where the copies of grad_tile find it: a
  // barrier makes what this block has written visible to all of it.
  __syncthreads();
  for (int tile = share; tile < tiles; tile += p.units) {
    grad_tile<Tile>(p, tile, mine, coefficients + p.index,
                    Penalties::takes_root(problems.penalty) ? &penalty : nullptr,
                    /*accumulate=*/true, shared);
  }
}

}  // namespace orthoreg::cuda
