// Device helpers that know neither layers nor penalties.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace orthoreg::cuda {

// The element types of weights and gradients; the numbers travel in kernel parameters.
enum class Type : int32_t { kDouble, kFloat, kHalf, kBFloat16 };

// Element i of an array, in the computing precision T. The switch is uniform over a block.
template <class T>
__device__ __forceinline__ T load(const void* data, int64_t i, Type type) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<const double*>(data)[i];
  } else {
    switch (type) {
      case Type::kHalf:
        return __half2float(static_cast<const __half*>(data)[i]);
      case Type::kBFloat16:
        return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
}

template <class T>
__device__ __forceinline__ void store(void* data, int64_t i, Type type, T value) {
  if constexpr (sizeof(T) == 8) {
    static_cast<double*>(data)[i] = value;
  } else {
    switch (type) {
      case Type::kHalf:
        static_cast<__half*>(data)[i] = __float2half_rn(value);
        break;
      case Type::kBFloat16:
        static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
        break;
      default:
        static_cast<float*>(data)[i] = value;
    }
  }
}

// The layer of a launch that a block belongs to: the last one that starts at or before it.
template <class Problems>
__device__ __forceinline__ int find_layer(const Problems& problems, int unit) {
  int low = 0, high = problems.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (problems.layer[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The sum over a warp, in every lane, in an order that never changes.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over a block of kThreads, valid in thread 0; `scratch` holds one entry a warp.
template <int kThreads>
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  }
  __syncthreads();
  return total;
}

}  // namespace orthoreg::cuda
