// What the hardware gives, measured by the instructions that the kernels are made of.
//
// Each kernel's result follows from how often it did its work, so that gpu_probes.py can compare
// the operations it counts with those that were done. The launchers only launch, on the stream
// given.
#include <cuda_runtime.h>

#include <cstdint>

#include "../csrc/cuda/device.cuh"

namespace {

using namespace orthoreg::cuda;

constexpr int kThreads = 256;
constexpr int kChains = 8;  // independent sums a warp (a thread), enough to hide the latency

// out[thread] = the thread's part of kChains sums of products of ones; 2 * sum(out) flops.
// a, b: 1 in the format of the instruction; unknown to the compiler.
template <bool kBFloat16>
__global__ void __launch_bounds__(kThreads)
    mma_kernel(uint32_t a, uint32_t b, int steps, float* out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const uint32_t left[4] = {a, a, a, a}, right[2] = {b, b};
  float sums[kChains][4] = {};
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) {
      if constexpr (kBFloat16) {
        mma_bf16(sums[chain], left, right);
      } else {
        mma_tf32(sums[chain], left, right);
      }
    }
  }
  float total = 0;
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < 4; ++i) total += sums[chain][i];
  }
  out[blockIdx.x * kThreads + threadIdx.x] = total;
#endif
}

// out[thread] = kChains * steps with a = b = 1; 2 * sum(out) flops.
__global__ void __launch_bounds__(kThreads) fma_kernel(float a, float b, int steps, float* out) {
  float sums[kChains] = {};
#pragma unroll 4
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = fmaf(sums[chain], a, b);
  }
  float total = 0;
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain) total += sums[chain];
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}

// Reads x [count] `rounds` times past the L1 cache; out[thread] = the sum of what the thread read.
// Each round starts elsewhere, so that a line comes to another multiprocessor every time.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* x, int count, int rounds, uint32_t* out) {
  constexpr int kAtOnce = 4;
  const int stride = gridDim.x * kThreads, first = blockIdx.x * kThreads + threadIdx.x;
  uint32_t total = 0;
  for (int round = 0; round < rounds; ++round) {
    const int shift = round * (kThreads + 32) % count;
    for (int i = first; i < count; i += kAtOnce * stride) {
      uint4 seen[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t at = static_cast<int64_t>(i) + static_cast<int64_t>(k) * stride;
        const int64_t from = at + shift < count ? at + shift : at + shift - count;
        seen[k] = at < count ? __ldcg(x + from) : uint4{};
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) total += seen[k].x + seen[k].y + seen[k].z + seen[k].w;
    }
  }
  out[first] = total;
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const uint4* x, uint4* y, int count) {
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    __stcs(y + i, __ldcs(x + i));
  }
}

__global__ void empty_kernel() {}

}  // namespace

#define PROBE(name) extern "C" __attribute__((visibility("default"))) int name

PROBE(probe_tf32)(float* out, int blocks, int steps, cudaStream_t stream) {
  mma_kernel<false><<<blocks, kThreads, 0, stream>>>(0x3f800000u, 0x3f800000u, steps, out);
  return cudaGetLastError();
}
PROBE(probe_bf16)(float* out, int blocks, int steps, cudaStream_t stream) {
  mma_kernel<true><<<blocks, kThreads, 0, stream>>>(0x3f803f80u, 0x3f803f80u, steps, out);
  return cudaGetLastError();
}
PROBE(probe_fma)(float* out, int blocks, int steps, cudaStream_t stream) {
  fma_kernel<<<blocks, kThreads, 0, stream>>>(1, 1, steps, out);
  return cudaGetLastError();
}
PROBE(probe_read)(const uint4* x, uint32_t* out, int blocks, int count, int rounds,
                  cudaStream_t stream) {
  read_kernel<<<blocks, kThreads, 0, stream>>>(x, count, rounds, out);
  return cudaGetLastError();
}
PROBE(probe_copy)(const uint4* x, uint4* y, int blocks, int count, cudaStream_t stream) {
  copy_kernel<<<blocks, kThreads, 0, stream>>>(x, y, count);
  return cudaGetLastError();
}
PROBE(probe_empty)(int launches, cudaStream_t stream) {
  for (int i = 0; i < launches; ++i) empty_kernel<<<1, 32, 0, stream>>>();
  return cudaGetLastError();
}
