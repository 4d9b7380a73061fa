// Device helpers that know neither layers nor penalties.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace orthoreg::cuda {

// The element types of weights and gradients; the numbers travel in kernel parameters.
enum class Type : uint8_t { kDouble, kFloat, kHalf, kBFloat16 };

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

// Four neighbouring elements in float; the address must be aligned to all four.
__device__ __forceinline__ float4 load4(const void* data, int64_t i, Type type) {
  if (type == Type::kFloat) {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
  }
  const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + i);
  if (type == Type::kHalf) {
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    return {low.x, low.y, high.x, high.y};
  }
  return {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
          __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u)};
}

// Arithmetic that the compiler neither fuses nor reorders, for sums that keep their rounding error
// and have the same bits in every kernel.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}

// An element in the computing precision.
template <class T, class E>
__device__ __forceinline__ T widen(E value) {
  if constexpr (sizeof(E) == 2) {
    return static_cast<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// 16 bytes that nothing writes during the launch; the address is aligned to 16.
__device__ __forceinline__ uint4 load_16(const void* global) {
  return __ldg(static_cast<const uint4*>(global));
}

// ---- PTX, one function an instruction; sm_80 and newer (each has a test in tests/emu/conformance)

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Starts a copy of 16 (both addresses aligned to it) or 4 bytes to shared memory; of those, all but
// the first `bytes` become zeros and are not read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Closes a group of copies; waits until at most kPending groups of this thread are under way.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// The nearest TF32 (10 bits of mantissa), as float bits; ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}

// Two nearest bfloat16, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// C [16, 8] += A [16, K] B [K, 8] over a warp, with g = lane / 4 and t = lane % 4:
//   c0 (g, 2t)  c1 (g, 2t+1)  c2 (g+8, 2t)  c3 (g+8, 2t+1)
//   TF32, K = 8:       a0 (g, t)  a1 (g+8, t)  a2 (g, t+4)  a3 (g+8, t+4)   b0 (t, g)  b1 (t+4, g)
//   bfloat16, K = 16:  the same with 2t, 2t+1 for t and 2t+8, 2t+9 for t+4, two in a register
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

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
