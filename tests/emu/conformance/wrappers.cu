// The PTX wrappers of csrc/cuda/device.cuh, each called alone; test_wrappers.py defines them.
#include "../../../csrc/cuda/device.cuh"
#include "../harness.h"

namespace {

using namespace orthoreg::cuda;

constexpr int kCounts = 17;  // byte counts 0 to 16

// Block b copies 32 times 16 bytes, of which it takes b, or 4 bytes, of which it takes min(b, 4).
__global__ void copies_16(const unsigned char* x, unsigned char* out) {
  __shared__ __align__(16) unsigned char tile[32 * 16];
  const int at = 16 * threadIdx.x;
  copy_async_16(tile + at, x + at, blockIdx.x);
  commit_copies();
  wait_copies<0>();
  for (int i = 0; i < 16; ++i) out[blockIdx.x * sizeof(tile) + at + i] = tile[at + i];
}
__global__ void copies_4(const unsigned char* x, unsigned char* out) {
  __shared__ __align__(16) unsigned char tile[32 * 4];
  const int at = 4 * threadIdx.x;
  copy_async_4(tile + at, x + at, min(static_cast<int>(blockIdx.x), 4));
  commit_copies();
  wait_copies<0>();
  for (int i = 0; i < 4; ++i) out[blockIdx.x * sizeof(tile) + at + i] = tile[at + i];
}

// Four groups of copies; after each wait the groups that must have arrived are read. seen
// [4 waits, 4 groups, 32]: 0 where a group may still be under way.
template <int kPending>
__device__ void read_arrived(const float (&tile)[4][32], float* seen) {
  wait_copies<kPending>();
  for (int group = 0; group < 4 - kPending; ++group) {
    seen[((3 - kPending) * 4 + group) * 32 + threadIdx.x] = tile[group][threadIdx.x];
  }
}
__global__ void waits(const float* x, float* seen) {
  __shared__ __align__(16) float tile[4][32];
  for (int group = 0; group < 4; ++group) {
    copy_async_4(&tile[group][threadIdx.x], x + 32 * group + threadIdx.x, 4);
    commit_copies();
  }
  read_arrived<3>(tile, seen);
  read_arrived<2>(tile, seen);
  read_arrived<1>(tile, seen);
  read_arrived<0>(tile, seen);
}

__global__ void conversions(const float* x, uint32_t* tf32, uint32_t* bf16, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  tf32[i] = to_tf32(x[i]);
  bf16[i] = pack_bf16(x[i], x[n - 1 - i]);
}

// c += a b for each of the blocks; a [16, K], b [K, 8], c [16, 8] row-major. Raw float bits go into
// the TF32 operands.
__global__ void products_tf32(const uint32_t* a, const uint32_t* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  a += blockIdx.x * 16 * 8, b += blockIdx.x * 8 * 8, c += blockIdx.x * 16 * 8;
  const uint32_t left[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4],
                            a[(g + 8) * 8 + t + 4]};
  const uint32_t right[2] = {b[t * 8 + g], b[(t + 4) * 8 + g]};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
__global__ void products_bf16(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  a += blockIdx.x * 16 * 16, b += blockIdx.x * 16 * 8, c += blockIdx.x * 16 * 8;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const float* from = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    left[i] = pack_bf16(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* from = b + (2 * t + i * 8) * 8 + g;
    right[i] = pack_bf16(from[0], from[8]);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_bf16(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// c = a b^T over `depth` entries in 3xTF32 for a [16, depth], b [8, depth]; the tensor cores' sums
// are added to ordinary ones every `promoted` steps of 8.
__global__ void long_products(const float* a, const float* b, float* c, int depth, int promoted) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float total[4] = {}, part[4] = {};
  for (int k = 0; k < depth; k += 8) {
    const float left[4] = {a[g * depth + k + t], a[(g + 8) * depth + k + t],
                           a[g * depth + k + t + 4], a[(g + 8) * depth + k + t + 4]};
    const float right[2] = {b[g * depth + k + t], b[g * depth + k + t + 4]};
    uint32_t big_left[4], small_left[4], big_right[2], small_right[2];
    for (int i = 0; i < 4; ++i) {
      big_left[i] = to_tf32(left[i]);
      small_left[i] = to_tf32(left[i] - __uint_as_float(big_left[i]));
    }
    for (int i = 0; i < 2; ++i) {
      big_right[i] = to_tf32(right[i]);
      small_right[i] = to_tf32(right[i] - __uint_as_float(big_right[i]));
    }
    mma_tf32(part, small_left, big_right);
    mma_tf32(part, big_left, small_right);
    mma_tf32(part, big_left, big_right);
    if ((k / 8 + 1) % promoted == 0 || k + 8 >= depth) {
      for (int i = 0; i < 4; ++i) total[i] += part[i], part[i] = 0;
    }
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = total[i];
}

}  // namespace

LAUNCHER(run_copies_16)(const unsigned char* x, unsigned char* out) {
  return guarded([&] { copies_16<<<kCounts, 32>>>(x, out); });
}
LAUNCHER(run_copies_4)(const unsigned char* x, unsigned char* out) {
  return guarded([&] { copies_4<<<kCounts, 32>>>(x, out); });
}
LAUNCHER(run_waits)(const float* x, float* seen) {
  return guarded([&] { waits<<<1, 32>>>(x, seen); });
}
LAUNCHER(run_conversions)(const float* x, uint32_t* tf32, uint32_t* bf16, int n) {
  return guarded([&] { conversions<<<(n + 127) / 128, 128>>>(x, tf32, bf16, n); });
}
LAUNCHER(run_products_tf32)(const uint32_t* a, const uint32_t* b, float* c, int count) {
  return guarded([&] { products_tf32<<<count, 32>>>(a, b, c); });
}
LAUNCHER(run_products_bf16)(const float* a, const float* b, float* c, int count) {
  return guarded([&] { products_bf16<<<count, 32>>>(a, b, c); });
}
LAUNCHER(run_long_products)(const float* a, const float* b, float* c, int depth, int promoted) {
  return guarded([&] { long_products<<<1, 32>>>(a, b, c, depth, promoted); });
}
