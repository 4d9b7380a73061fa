// Fused filter scores: every criterion of every layer in one launch.
//
// One warp computes all criteria of one filter (dim 0) or one input channel (dim 1) from one pass
// over its weights and gradients. The lanes take neighbouring entries; sums that cannot cancel are
// kept in float a lane, the signed one in double, and all are added over the warp in a fixed order.
//   reads w and g once; writes one number a criterion
#pragma once

#include "../common/plan.h"
#include "device.cuh"

namespace orthoreg::cuda {

constexpr int kWarps = 8;  // scores a block
constexpr int kMaxScoreCriteria = 6;

struct ScoreProblem {  // see common/scores.h
  const void *weight, *grad, *bias, *bias_grad;
  int64_t stride, grad_stride, input_stride, tap_stride;
  int64_t first;  // where its scores start in each row of the output
  int32_t n, k, inputs, taps;
  int32_t first_unit;  // its first block
  int32_t scores;
  Type type;
};

constexpr int kScoreLayersPerLaunch = kLayersPerLaunch * 9 / 10;

struct ScoreProblems {
  int32_t count, criteria;
  int32_t criterion[kMaxScoreCriteria];
  ScoreProblem layer[kScoreLayersPerLaunch];
};
static_assert(sizeof(ScoreProblems) <= (kLayersPerLaunch > 36 ? 32700 : 4000),
              "kernel parameter space");

template <class T>
struct LaneSums {
  T abs_w = 0, square_w = 0, abs_wg = 0, square_wg = 0;
  double wg = 0;

  __device__ __forceinline__ void add(T w) {
    abs_w += w < T(0) ? -w : w;
    square_w += w * w;
  }
  __device__ __forceinline__ void add(T w, T g) {
    add(w);
    const T product = w * g;
    abs_wg += product < T(0) ? -product : product;
    square_wg += product * product;
    wg += static_cast<double>(w) * static_cast<double>(g);
  }
};

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    filter_scores_kernel(const __grid_constant__ ScoreProblems problems, T* __restrict__ out,
                         int64_t total, int dim) {
  const ScoreProblem& p = problems.layer[find_layer(problems, blockIdx.x)];
  const int lane = threadIdx.x % 32;
  const int index = (blockIdx.x - p.first_unit) * kWarps + threadIdx.x / 32;
  if (index >= p.scores) return;  // a whole warp

  LaneSums<T> sums;
  const auto add = [&](const void* weight, int64_t at, const void* grad, int64_t grad_at) {
    const T w = load<T>(weight, at, p.type);
    if (grad == nullptr) {
      sums.add(w);
    } else {
      sums.add(w, load<T>(grad, grad_at, p.type));
    }
  };
  if (dim == 0) {
    const int64_t start = index * p.stride, grad_start = index * p.grad_stride;
    for (int j = lane; j < p.k; j += 32) add(p.weight, start + j, p.grad, grad_start + j);
    if (p.bias != nullptr && lane == 0) add(p.bias, index, p.bias_grad, index);
  } else {
    const int group = index / p.inputs, channel = index % p.inputs;
    const int64_t first = static_cast<int64_t>(group) * p.n;
    const int64_t entries = static_cast<int64_t>(p.n) * p.taps;
    for (int64_t e = lane; e < entries; e += 32) {
      const int64_t filter = first + e / p.taps;
      const int64_t inside = channel * p.input_stride + e % p.taps * p.tap_stride;
      add(p.weight, filter * p.stride + inside, p.grad, filter * p.grad_stride + inside);
    }
  }

  const double abs_w = warp_sum(sums.abs_w), square_w = warp_sum(sums.square_w);
  const double abs_wg = warp_sum(sums.abs_wg), square_wg = warp_sum(sums.square_wg);
  const double wg = warp_sum(sums.wg);
  // in the order of Criterion in common/scores.h
  const double scores[kMaxScoreCriteria] = {abs_w,     sqrt(square_w), wg < 0 ? -wg : wg,
                                            square_wg, abs_wg,         wg * wg};
  if (lane == 0) {
#pragma unroll
    for (int which = 0; which < kMaxScoreCriteria; ++which) {
      for (int c = 0; c < problems.criteria; ++c) {
        if (problems.criterion[c] == which) out[c * total + p.first + index] = scores[which];
      }
    }
  }
}

}  // namespace orthoreg::cuda
