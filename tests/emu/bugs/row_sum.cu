// Sums of rows, and one planted bug a BUG_ macro: what the emulator must find
// (tests/test_emulator.py).
#include "../harness.h"

constexpr int kThreads = 128, kWarps = kThreads / 32;

// One block a row: tiles of the row go through shared memory, each element to another thread.
__global__ void __launch_bounds__(kThreads) row_sum(const float* x, float* out, int k) {
  __shared__ float tile[kThreads];
  __shared__ float part[kWarps];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const float* row = x + size_t(blockIdx.x) * k;
  float sum = 0;
  for (int start = 0; start < k; start += kThreads) {
#ifdef BUG_GLOBAL_OVERRUN
    tile[t] = start + t <= k ? row[start + t] : 0;
#else
    tile[t] = start + t < k ? row[start + t] : 0;
#endif
#ifdef BUG_DIVERGENT
    if (t < 100)
      __syncthreads();
    else
      __syncthreads();
#else
    __syncthreads();
#endif
    sum += tile[kThreads - 1 - t];
#ifndef BUG_MISSING_SYNC
    __syncthreads();
#endif
  }
#ifdef BUG_DEADLOCK
  if (t >= 112) return;  // and the rest of the last warp waits in the shuffle
#endif
#ifdef BUG_SHUFFLE
  if (lane < 16) {
    for (int o = 16; o; o /= 2) sum += __shfl_down_sync(0xffff, sum, o);
  }
#else
  for (int o = 16; o; o /= 2) sum += __shfl_down_sync(~0u, sum, o);
#endif
#ifdef BUG_SHARED_OVERRUN
  if (lane == 0) part[warp + 1] = sum;
#else
  if (lane == 0) part[warp] = sum;
#endif
  __syncthreads();
#ifdef BUG_MISALIGNED
  if (t == 0) {
    const float2 two = *reinterpret_cast<const float2*>(&part[1]);
    out[blockIdx.x] = part[0] + two.x + two.y + part[3];
  }
#elif defined(BUG_BLOCK_RACE)
  if (t == 0) out[0] += part[0] + part[1] + part[2] + part[3];  // all blocks
#else
  if (t == 0) out[blockIdx.x] = part[0] + part[1] + part[2] + part[3];
#endif
}

LAUNCHER(run)(const float* x, float* out, int n, int k) {
#ifdef BUG_TOO_MANY_THREADS
  constexpr int threads = 2 * kThreads;
#else
  constexpr int threads = kThreads;
#endif
  return guarded([&] { row_sum<<<n, threads>>>(x, out, k); });
}
