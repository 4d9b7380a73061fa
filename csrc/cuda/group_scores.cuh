// The scores of the coupled groups of a network in one launch.
#pragma once

#include "device.cuh"

namespace orthoreg::cuda {

// Tensors of scores of one launch: 32 764 bytes of parameters from CUDA 12.1 on, 4 096 before.
#if CUDART_VERSION < 12010
constexpr int kScoreTensors = 320;
#else
constexpr int kScoreTensors = 2600;
#endif

struct ScoreTensors {  // see common/group_scores.h
  const void* scores[kScoreTensors];
  int32_t lengths[kScoreTensors];
  int32_t count, reduction;  // in the order of Reduction
  const int64_t *entries, *starts;
  int64_t entry_count, roots;
};
static_assert(sizeof(ScoreTensors) <= (kScoreTensors > 320 ? 32764 - 64 : 4096 - 64),
              "kernel parameter space");

constexpr int kRootsPerBlock = 256;

// One thread a root channel: gathers its entries in their order and reduces them, in double.
//   reads 8 bytes of tables and one score an entry, writes one number a root channel; an entry
//   outside the scores reads as NaN, so that a wrong table shows and harms nothing
template <class T>
__global__ void __launch_bounds__(kRootsPerBlock)
    group_scores_kernel(const __grid_constant__ ScoreTensors p, T* __restrict__ out) {
  const int64_t root = static_cast<int64_t>(blockIdx.x) * kRootsPerBlock + threadIdx.x;
  if (root >= p.roots) return;
  const int64_t begin = p.starts[root], end = p.starts[root + 1];
  const double nothing = __longlong_as_double(0x7ff8000000000000ll);
  double result = nothing;
  if (begin < 0 || end > p.entry_count) {
    out[root] = static_cast<T>(nothing);
    return;
  }
  for (int64_t e = begin; e < end; ++e) {
    const int64_t entry = p.entries[e];
    const int64_t tensor = entry >> 32, index = entry & 0xffffffff;
    double value = nothing;
    if (tensor >= 0 && tensor < p.count && index < p.lengths[tensor]) {
      value = static_cast<const T*>(p.scores[tensor])[index];
    }
    if (e == begin) {
      result = value;
    } else if (p.reduction == 2) {
      result = value > result || value != value ? value : result;
    } else if (p.reduction < 2) {
      result += value;
    }
  }
  if (p.reduction == 1) result /= static_cast<double>(end - begin);
  out[root] = static_cast<T>(result);
}

}  // namespace orthoreg::cuda
