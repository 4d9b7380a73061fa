// The tile product that the Gram and the gradient kernels share, and what they know of a layer.
#pragma once

#include "../common/plan.h"
#include "device.cuh"

namespace orthoreg::cuda {

// One layer of a launch (see common/layers.h), 88 bytes.
struct Problem {
  const void *weight, *bias;
  void *grad, *bias_grad;  // gradient kernels only
  int64_t stride, grad_stride;
  int64_t slopes;  // where its [groups, m, m] starts in the flat buffer
  double offset;
  int32_t n, k, width;  // width = k, or k + 1 with a bias
  int32_t first_unit;   // its first block
  Type type;
  int32_t columns;
};

struct Problems {
  int32_t count, units;
  Problem layer[kLayersPerLaunch];
};
static_assert(sizeof(Problems) <= (kLayersPerLaunch > 36 ? 32000 : 3800), "kernel parameter space");

__device__ __forceinline__ int gram_size(const Problem& p) { return p.columns ? p.width : p.n; }

// Entry j of filter i of a group, the bias being the last one; 0 outside.
template <class T>
__device__ __forceinline__ T entry(const Problem& p, int group, int i, int j) {
  if (i >= p.n || j >= p.width) return T(0);
  const int64_t filter = static_cast<int64_t>(group) * p.n + i;
  return j < p.k ? load<T>(p.weight, filter * p.stride + j, p.type)
                 : load<T>(p.bias, filter, p.type);
}

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;  // at least; leaves up to 128 registers a thread
constexpr int kSlab = 16;        // inner entries in shared memory at once
constexpr int kPerThread = 4;    // a thread owns kPerThread x kPerThread outputs
constexpr int kAcross = kTile / kPerThread;
static_assert(kAcross * kAcross == kThreads);

// One slab of each operand, the inner dimension first; padded so that columns fall in other banks.
template <class T>
struct Slabs {
  T a[kSlab][kTile + kPerThread];
  T b[kSlab][kTile + kPerThread];
};

// sum[x][y] = sum_p A(4 ty + x, p) B(p, 4 tx + y), with tx = thread % 16 and ty = thread / 16, for
// A(i, p) = a(i, p) and B(p, j) = b(p, j), both 0 outside their matrix.
//   a_along_inner, b_along_inner: whether neighbours in memory are neighbours in p (else in i, j).
//   each_slab(slabs) is called with every slab in shared memory.
// 2 kTile^2 flops and 2 kTile loads for each p. Two barriers a slab: after it is filled, and before
// it is overwritten.
template <class T, class A, class B, class EachSlab>
__device__ __forceinline__ void tile_product(Slabs<T>& slabs, int inner, bool a_along_inner,
                                             bool b_along_inner, const A& a, const B& b,
                                             const EachSlab& each_slab,
                                             T (&sum)[kPerThread][kPerThread]) {
  const int tx = threadIdx.x % kAcross, ty = threadIdx.x / kAcross;
  for (int start = 0; start < inner; start += kSlab) {
#pragma unroll 1
    for (int e = threadIdx.x; e < kSlab * kTile; e += kThreads) {
      const int p = a_along_inner ? e % kSlab : e / kTile;
      const int i = a_along_inner ? e / kSlab : e % kTile;
      slabs.a[p][i] = start + p < inner ? a(i, start + p) : T(0);
    }
#pragma unroll 1
    for (int e = threadIdx.x; e < kSlab * kTile; e += kThreads) {
      const int p = b_along_inner ? e % kSlab : e / kTile;
      const int j = b_along_inner ? e / kSlab : e % kTile;
      slabs.b[p][j] = start + p < inner ? b(start + p, j) : T(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int p = 0; p < kSlab; ++p) {
      T left[kPerThread], right[kPerThread];
#pragma unroll
      for (int x = 0; x < kPerThread; ++x) left[x] = slabs.a[p][ty * kPerThread + x];
#pragma unroll
      for (int y = 0; y < kPerThread; ++y) right[y] = slabs.b[p][tx * kPerThread + y];
#pragma unroll
      for (int x = 0; x < kPerThread; ++x) {
#pragma unroll
        for (int y = 0; y < kPerThread; ++y) sum[x][y] += left[x] * right[y];
      }
    }
    each_slab(slabs);
    __syncthreads();
  }
}

}  // namespace orthoreg::cuda
