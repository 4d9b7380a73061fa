// A tile of a product by fused multiply-adds: float64, "ieee" float32, and GPUs before sm_80.
#pragma once

#include "problem.cuh"

namespace orthoreg::cuda {

// One block of 256 threads; each owns 4 x 4 sums.
//   cost of an inner entry: 64^2 multiply-adds, 2 x 64 loads
template <class T>
struct SimtTile {
  using Number = T;
  static constexpr int kTile = 64, kThreads = 256, kBlocksPerSm = 2;
  static constexpr int kDepth = 16;  // inner entries in shared memory at once
  static constexpr int kMine = 4, kAcross = kTile / kMine, kStride = kTile + kMine;
  static constexpr int kSharedBytes = 2 * kDepth * kStride * static_cast<int>(sizeof(T));
  using Sums = T[kMine][kMine];

  // Entry (r, q) of a panel in shared memory, whichever way it lay in memory.
  struct Panel {
    const T* data;
    __device__ __forceinline__ int turn(int q) const { return q; }
    __device__ __forceinline__ T operator()(int r, int q) const { return data[q * kStride + r]; }
  };

  // sums += A B for inner entries [begin, end), with A(i, q) = a(first_a + i, q) if kAlongA, else
  // a(q, first_a + i), and B(q, j) alike. each_panel(panel of A, entries) sees all of A go by.
  // Two barriers a step: after the panels are filled, and before they are overwritten.
  template <bool kAlongA, bool kAlongB, class EachPanel>
  static __device__ __forceinline__ void multiply(char* shared, const Matrix& a, int first_a,
                                                  const Matrix& b, int first_b, bool /*same*/,
                                                  int begin, int end, const EachPanel& each_panel,
                                                  Sums& sums) {
    T* panel_a = reinterpret_cast<T*>(shared);
    T* panel_b = panel_a + kDepth * kStride;
    const int tx = threadIdx.x % kAcross, ty = threadIdx.x / kAcross;
    for (int start = begin; start < end; start += kDepth) {
      fill<kAlongA>(panel_a, a, first_a, start, end);
      fill<kAlongB>(panel_b, b, first_b, start, end);
      __syncthreads();
#pragma unroll 4
      for (int q = 0; q < kDepth; ++q) {
        T left[kMine], right[kMine];
#pragma unroll
        for (int x = 0; x < kMine; ++x) left[x] = panel_a[q * kStride + ty * kMine + x];
#pragma unroll
        for (int y = 0; y < kMine; ++y) right[y] = panel_b[q * kStride + tx * kMine + y];
#pragma unroll
        for (int x = 0; x < kMine; ++x) {
#pragma unroll
          for (int y = 0; y < kMine; ++y) sums[x][y] += left[x] * right[y];
        }
      }
      each_panel(Panel{panel_a}, kDepth);
      __syncthreads();
    }
  }

  // Calls visit(row, column, sum) for the sums of this thread.
  template <class Visit>
  static __device__ __forceinline__ void for_each(const Sums& sums, const Visit& visit) {
    const int tx = threadIdx.x % kAcross, ty = threadIdx.x / kAcross;
#pragma unroll
    for (int x = 0; x < kMine; ++x) {
#pragma unroll
      for (int y = 0; y < kMine; ++y) visit(ty * kMine + x, tx * kMine + y, sums[x][y]);
    }
  }

 private:
  template <bool kAlong>
  static __device__ __forceinline__ void fill(T* panel, const Matrix& matrix, int first, int start,
                                              int end) {
#pragma unroll 1
    for (int e = threadIdx.x; e < kDepth * kTile; e += kThreads) {
      // neighbouring threads take neighbours in memory
      const int q = kAlong ? e % kDepth : e / kTile, r = kAlong ? e / kDepth : e % kTile;
      const int row = kAlong ? first + r : start + q, column = kAlong ? start + q : first + r;
      const bool inside = start + q < end && column < matrix.width() && matrix.has_row(row);
      panel[q * kStride + r] = inside ? matrix.template entry<T>(row, column) : T(0);
    }
  }
};

}  // namespace orthoreg::cuda
