// G = X X^T on tensor cores behind a cp.async pipeline, and one planted bug a BUG_ macro.
#include "../harness.h"

constexpr int kTile = 64, kDepth = 32, kStride = kDepth + 4, kStages = 4;

struct Stage {
  float a[kTile][kStride], b[kTile][kStride];
};

__device__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef BUG_SWAPPED_OPERANDS
  const uint32_t a1 = a[2], a2 = a[1];
#else
  const uint32_t a1 = a[1], a2 = a[2];
#endif
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a1), "r"(a2), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// k % 4 == 0; rows and columns beyond x are zero.
__device__ void load(float (*tile)[kStride], const float* x, int row, int column, int n, int k) {
  for (int i = threadIdx.x; i < kTile * kDepth / 4; i += blockDim.x) {
    const int r = i / (kDepth / 4), c = i % (kDepth / 4) * 4;
    const bool inside = row + r < n && column + c < k;
    const float* from = inside ? x + size_t(row + r) * k + column + c : x;
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(&tile[r][c]));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
  }
}

__global__ void __launch_bounds__(128) gram(const float* x, float* g, int n, int k) {
  extern __shared__ __align__(16) unsigned char memory[];
  Stage* stages = reinterpret_cast<Stage*>(memory);
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile,
            steps = (k + kDepth - 1) / kDepth;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  float sum[8][4] = {};  // warp w: rows 16 w ..., all 64 columns
  const auto fetch = [&](int step) {
    if (step < steps) {
      load(stages[step % kStages].a, x, row, step * kDepth, n, k);
      load(stages[step % kStages].b, x, column, step * kDepth, n, k);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int s = 0; s < kStages - 1; ++s) fetch(s);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#ifdef BUG_LAX_WAIT
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
#endif
#ifndef BUG_MISSING_SYNC
    __syncthreads();  // everybody's copies are there, and everybody has read the oldest stage
#endif
    fetch(step + kStages - 1);
    const Stage& s = stages[step % kStages];
    for (int z = 0; z < kDepth; z += 8) {
      const float* top = &s.a[16 * warp + group][z + quad];
      const uint32_t a[4] = {to_tf32(top[0]), to_tf32(top[8 * kStride]), to_tf32(top[4]),
                             to_tf32(top[8 * kStride + 4])};
      for (int j = 0; j < 8; ++j) {
        const uint32_t b[2] = {to_tf32(s.b[8 * j + group][z + quad]),
                               to_tf32(s.b[8 * j + group][z + quad + 4])};
        mma(sum[j], a, b);
      }
    }
  }
  for (int j = 0; j < 8; ++j) {
    for (int e = 0; e < 4; ++e) {
      const int r = row + 16 * warp + group + e / 2 * 8, c = column + 8 * j + 2 * quad + e % 2;
      if (r < n && c < n) g[size_t(r) * n + c] = sum[j][e];
    }
  }
}

LAUNCHER(run)(const float* x, float* g, int n, int k) {
  return guarded([&] {
    constexpr int bytes = kStages * sizeof(Stage);
#ifndef BUG_NO_OPT_IN
    cudaFuncSetAttribute(gram, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
#endif
    const unsigned tiles = (n + kTile - 1) / kTile;
    gram<<<dim3(tiles, tiles), 128, bytes>>>(x, g, n, k);
  });
}
