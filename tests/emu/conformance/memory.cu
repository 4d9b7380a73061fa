// Conformance of what one line of assembly cannot show: state spaces, copies, barriers, calls.
// tests/test_emulator.py holds what each launcher must give.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdio>

#include "../harness.h"

// Every width, sign extension, vectors, cache hints, predicated stores. x: 64 x 16 bytes.
__global__ void loads(const unsigned char* x, int64_t* out) {
  const unsigned char* p = x + 16 * threadIdx.x;
  int64_t* o = out + 16 * threadIdx.x;
  int v;
  o[0] = *reinterpret_cast<const signed char*>(p), o[1] = *p;
  o[2] = *reinterpret_cast<const int16_t*>(p + 2), o[3] = *reinterpret_cast<const uint16_t*>(p + 2);
  const int4 four = *reinterpret_cast<const int4*>(p);
  o[4] = four.x, o[5] = four.y, o[6] = four.z, o[7] = four.w;
  const uint2 two = __ldg(reinterpret_cast<const uint2*>(p + 8));
  o[8] = two.x, o[9] = two.y;
  o[10] = *reinterpret_cast<const volatile int*>(p + 4);
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p + 4));
  o[11] = v;
  asm volatile("ld.acquire.gpu.b32 %0, [%1+8];" : "=r"(v) : "l"(p));
  o[12] = v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.b32 %0, [%1+12];" : "=r"(v) : "l"(p));
  o[13] = v;
  asm volatile(
      "{.reg .pred p; setp.lt.s32 p, %2, 32; @p st.global.b64 [%0], %1; @!p st.release.gpu.b64 "
      "[%0], -1;}" ::"l"(o + 14),
      "l"(o[1]), "r"(threadIdx.x));
  o[15] = __ldcs(reinterpret_cast<const short*>(p) + 7);
}
LAUNCHER(run_loads)(const unsigned char* x, int64_t* out) {
  return guarded([&] { loads<<<1, 64>>>(x, out); });
}

// The blocks' totals are the same in any order.
__global__ void atomics(const int* x, int* i, unsigned* u, float* f, double* d,
                        unsigned long long* l) {
  __shared__ int counter;
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  const int v = x[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&counter, v);
  atomicAdd(i, v), atomicMin(i + 1, v), atomicMax(i + 2, v);
  atomicSub(i + 3, v);
  atomicAnd(u, unsigned(v) | 0xffff0000u), atomicOr(u + 1, unsigned(v)),
      atomicXor(u + 2, unsigned(v));
  atomicInc(u + 3, 16), atomicDec(u + 4, 16);
  atomicMax(u + 5, unsigned(v)), atomicMin(u + 6, unsigned(v));
  atomicAdd(f, float(v % 8)), atomicAdd(d, 0.5 * (v % 8));
  atomicAdd(l, (unsigned long long)v), atomicMax(l + 1, (unsigned long long)unsigned(v));
  int was = *reinterpret_cast<volatile int*>(i + 4);
  for (int seen = ~was; seen != was;)
    seen = was, was = atomicCAS(i + 4, seen, seen + v), was == seen ? 0 : (seen = ~was);
  if (atomicExch(u + 7, 1u) > 1u) i[5] = 1;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(i + 6, counter);
}
LAUNCHER(run_atomics)(const int* x, int* i, unsigned* u, float* f, double* d,
                      unsigned long long* l) {
  return guarded([&] { atomics<<<4, 96>>>(x, i, u, f, d, l); });
}

// cp.async of 4, 8 and 16 bytes, of which x[thread] % (bytes + 1) are taken and the rest is zero.
template <int BYTES>
__device__ void copy(unsigned char* to, const unsigned char* from, unsigned taken) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(from),
                 "r"(taken)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(BYTES),
                 "r"(taken)
                 : "memory");
  }
}
__global__ void copies(const unsigned char* x, unsigned char* out) {
  __shared__ __align__(16) unsigned char tile[64 * 32];
  const int t = threadIdx.x;
  unsigned char* mine = tile + 32 * t;
  copy<16>(mine, x + 32 * t, x[t] % 17);
  asm volatile("cp.async.commit_group;" ::: "memory");
  copy<8>(mine + 16, x + 32 * t + 16, x[t] % 9);
  asm volatile("cp.async.commit_group; cp.async.wait_group 1;" ::: "memory");
  out[64 * 32 + t] = mine[0];
  copy<4>(mine + 24, x + 32 * t + 24, x[t] % 5);
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(mine + 28));
  asm volatile(
      "{.reg .pred p; setp.lt.s32 p, %2, 32; cp.async.ca.shared.global [%0], [%1], 4, p;}" ::"r"(
          at),
      "l"(x + 32 * t + 28), "r"(t)
      : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  for (int i = t; i < 64 * 32; i += 64) out[i] = tile[i];
}
LAUNCHER(run_copies)(const unsigned char* x, unsigned char* out) {
  return guarded([&] { copies<<<1, 64>>>(x, out); });
}

// ldmatrix .x1 .x2 .x4, plain and transposed, of four 8 x 8 matrices of 16 bits.
__global__ void matrices(const uint16_t* x, uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[4 * 64];
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = x[i];
  __syncthreads();
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(tile + 8 * threadIdx.x));
  uint32_t* o = out + 14 * threadIdx.x;
#define LDMATRIX(x, trans, regs, ...) \
  asm volatile("ldmatrix.sync.aligned.m8n8." x trans ".shared.b16 {" regs "}, [%" __VA_ARGS__)
  LDMATRIX("x1", "", "%0", "1];" : "=r"(o[0]) : "r"(at));
  LDMATRIX("x2", "", "%0,%1", "2];" : "=r"(o[1]), "=r"(o[2]) : "r"(at));
  LDMATRIX("x4", "", "%0,%1,%2,%3", "4];" : "=r"(o[3]), "=r"(o[4]), "=r"(o[5]),
           "=r"(o[6]) : "r"(at));
  LDMATRIX("x1", ".trans", "%0", "1];" : "=r"(o[7]) : "r"(at));
  LDMATRIX("x2", ".trans", "%0,%1", "2];" : "=r"(o[8]), "=r"(o[9]) : "r"(at));
  LDMATRIX("x4", ".trans", "%0,%1,%2,%3", "4];" : "=r"(o[10]), "=r"(o[11]), "=r"(o[12]),
           "=r"(o[13]) : "r"(at));
}
LAUNCHER(run_matrices)(const uint16_t* x, uint32_t* out) {
  return guarded([&] { matrices<<<1, 32>>>(x, out); });
}

// Votes of a block, a barrier of each half of it, and a producer that only arrives.
__global__ void barriers(const int* x, int* out) {
  __shared__ int half[2], passed[64];
  const int t = threadIdx.x, h = t / 64;
  out[3 * t] = __syncthreads_count(x[t] > 0);
  out[3 * t + 1] = __syncthreads_and(x[t] > -100) + 2 * __syncthreads_or(x[t] > 100);
  if (t % 64 == 0) half[h] = x[t];
  asm volatile("bar.sync %0, 64;" ::"r"(h + 1) : "memory");
  out[3 * t + 2] = half[h];
  if (h == 0) {
    passed[t] = x[t];
    asm volatile("bar.arrive 5, 128;" ::: "memory");
  } else {
    asm volatile("barrier.sync 5, 128;" ::: "memory");
    out[3 * t] += passed[127 - t];
  }
}
LAUNCHER(run_barriers)(const int* x, int* out) {
  return guarded([&] { barriers<<<1, 128>>>(x, out); });
}

// Calls, function pointers, recursion, local arrays, constants, globals, tables, a struct
// parameter.
struct Table {
  int64_t factor[500];
  int count;
};
__constant__ int kPrimes[8] = {2, 3, 5, 7, 11, 13, 17, 19};
__constant__ int written[2];
__device__ int global_table[4] = {100, 200, 300, 400};
__device__ int* global_pointer = global_table + 1;
__device__ __noinline__ int twice(int x) { return 2 * x; }
__device__ __noinline__ int square(int x) { return x * x; }
__device__ __noinline__ int factorial(int n) { return n < 2 ? 1 : n * factorial(n - 1); }
__device__ __noinline__ int through_shared(int x) {
  __shared__ int box[64];
  box[threadIdx.x] = x;
  __syncthreads();
  const int other = box[63 - threadIdx.x];
  __syncthreads();
  return other;
}
__global__ void calls(const __grid_constant__ Table table, const int* x, int* out) {
  extern __shared__ int dynamic[];
  const int t = threadIdx.x, v = x[t];
  int (*const function)(int) = v & 1 ? twice : square;
  int local[8];
  for (int i = 0; i < 8; ++i) local[i] = v + kPrimes[(i + v) & 7];
  local[v & 7] += 1000;
  dynamic[t] = v;
  __syncthreads();
  int jump = 0;
  asm("{.reg .u32 i; and.b32 i, %1, 3; table: .branchtargets A, B, C, D; brx.idx i, table;\n"
      "A: mov.u32 %0, 10; bra.uni END; B: mov.u32 %0, 20; bra.uni END; C: mov.u32 %0, 30; bra "
      "END;\n"
      "D: mov.u32 %0, 40;\nEND: }"
      : "=r"(jump)
      : "r"(v));
  int* o = out + 8 * t;
  o[0] = function(v & 0xff), o[1] = factorial(v & 7), o[2] = local[(v >> 3) & 7],
  o[3] = through_shared(v);
  o[4] = int(table.factor[t % table.count]), o[5] = global_pointer[v & 1] + written[1], o[6] = jump;
  o[7] = dynamic[63 - t];
}
LAUNCHER(run_calls)(const int* x, int* out) {
  return guarded([&] {
    Table table = {};
    for (int i = 0; i < 500; ++i) table.factor[i] = 3 * i;
    table.count = 50;
    const int two[2] = {4, 5};
    cudaMemcpyToSymbol(written, two, sizeof two);
    calls<<<1, 64, 64 * sizeof(int)>>>(table, x, out);
  });
}

// All 16-bit patterns to float, and floats to both halves in the ways the headers offer.
__global__ void halves(const uint16_t* bits, const float* x, float* from, uint16_t* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  if (i < 65536) {
    from[i] = __half2float(__ushort_as_half(bits[i]));
    from[65536 + i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
  }
  to[i] = __half_as_ushort(__float2half_rn(x[i]));
  to[n + i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
  to[2 * n + i] = __half_as_ushort(__double2half(double(x[i])));
  const __half2 pair = __floats2half2_rn(x[i], x[n - 1 - i]);
  to[3 * n + i] = __half_as_ushort(__low2half(pair));
  const __nv_bfloat162 bpair = __floats2bfloat162_rn(x[n - 1 - i], x[i]);
  to[4 * n + i] = __bfloat16_as_ushort(__high2bfloat16(bpair));
}
LAUNCHER(run_halves)(const uint16_t* bits, const float* x, float* from, uint16_t* to, int n) {
  return guarded([&] { halves<<<(n + 255) / 256, 256>>>(bits, x, from, to, n); });
}

// What stops a kernel: only in the emulator, for on a GPU they end the process's context.
__global__ void stops(int* x, int what) {
  if (what == 1) assert(threadIdx.x < 3);
  if (what == 2 && threadIdx.x == 4) asm volatile("trap;");
  if (what == 3) x[0] = reinterpret_cast<const int*>(uintptr_t(blockIdx.x))[threadIdx.x];
  if (what == 4) asm volatile("bar.sync 2, %0;" ::"r"(12 * what));
  if (what == 5 && threadIdx.x == 1) printf("%s %d|%5.2f|%lld%%\n", "one", 2, 3.25, 1ll << 40);
  x[threadIdx.x] = int(threadIdx.x);
}
LAUNCHER(run_stops)(int* x, int what) {
  return guarded([&] { stops<<<1, 32>>>(x, what); });
}

// Launch limits; `unchecked` leaves an error behind that nobody asks about.
__global__ void __launch_bounds__(64) bounded(int* x) {
  extern __shared__ int memory[];
  memory[threadIdx.x] = 1;
  x[threadIdx.x] = memory[threadIdx.x];
}
LAUNCHER(run_limits)(int* x, int grid_y, int threads, int bytes, int opt_in) {
  return guarded([&] {
    if (opt_in >= 0)
      cudaFuncSetAttribute(bounded, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in);
    bounded<<<dim3(1, grid_y), threads, bytes>>>(x);
  });
}
LAUNCHER(run_unchecked)(int* x) {
  return guarded([&] {
    bounded<<<1, 65>>>(x);
    bounded<<<1, 64>>>(x);
  });
}

// What host code asks a device.
LAUNCHER(run_device)(int* out) {
  return guarded([&] {
    cudaGetDevice(out);
    cudaDeviceGetAttribute(out + 1, cudaDevAttrMultiProcessorCount, 0);
    cudaDeviceGetAttribute(out + 2, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(out + 3, bounded, 64, 100 * 1024);
    cudaFuncAttributes attributes;
    cudaFuncGetAttributes(&attributes, bounded);
    out[4] = attributes.maxThreadsPerBlock;
    cudaMemsetAsync(out + 5, 0, sizeof(int), nullptr);
    cudaMemcpyAsync(out + 6, out + 4, sizeof(int), cudaMemcpyDefault, nullptr);
  });
}
