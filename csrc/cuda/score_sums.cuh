// The sums of the filter scores in registers: terms of an entry, sums of a thread, totals of lanes.
#pragma once

#include "device.cuh"

namespace orthoreg::cuda {

// What a launch reads: w; w and g; or w, g and the accumulated squares F.
enum ScoreMode { kWeights, kGrads, kFisherToo };

// abs_w, square_w; abs_wg, square_wg, wg in two parts; square_w_fisher
template <int kMode>
constexpr int kStatistics = kMode == kWeights ? 2
                            : kMode == kGrads ? 6
                                              : 7;

// What `high` lacks of `value`; nothing where that overflows.
template <class T>
__device__ __forceinline__ T rest_of(double value, T high) {
  return high - high == T(0) ? static_cast<T>(value - static_cast<double>(high)) : T(0);
}

// What an entry adds. The product w g is kept with its rounding error, so that the signed sum is
// as if in twice the precision (Ogita, Rump and Oishi, Accurate sum and dot product, 2005); that of
// two half-precision numbers is exact.
template <class T, int kMode, bool kExact>
struct Terms {
  T w, product, rest, fisher;

  __device__ __forceinline__ Terms(T w_, T g, T f) : w(w_) {
    if constexpr (kMode != kWeights) {
      product = multiply(w, g);
      if constexpr (!kExact) rest = multiply_add(w, g, -product);
    }
    if constexpr (kMode == kFisherToo) fisher = f;
  }
};

template <class T, int kMode>
struct Sums {
  T abs_w = 0, square_w = 0, abs_wg = 0, square_wg = 0, high = 0, low = 0, square_w_fisher = 0;

  template <bool kExact>
  __device__ __forceinline__ void add(const Terms<T, kMode, kExact>& t) {
    abs_w += t.w < T(0) ? -t.w : t.w;
    square_w = multiply_add(t.w, t.w, square_w);
    if constexpr (kMode != kWeights) {
      abs_wg += t.product < T(0) ? -t.product : t.product;
      square_wg = multiply_add(t.product, t.product, square_wg);
      const T sum = plus(high, t.product);
      const T added = plus(sum, -high);
      low += plus(plus(high, -plus(sum, -added)), plus(t.product, -added));
      if constexpr (!kExact) low += t.rest;
      high = sum;
    }
    if constexpr (kMode == kFisherToo) {
      square_w_fisher = multiply_add(multiply(t.w, t.w), t.fisher, square_w_fisher);
    }
  }

  // An overflow stays infinite, whatever its rest says.
  __device__ __forceinline__ double wg() const {
    return static_cast<double>(high) + (high - high == T(0) ? static_cast<double>(low) : 0.0);
  }
};

// The sums of a thread on their way through its warp.
template <class T, int kMode>
struct Total {
  T plain[kMode == kFisherToo ? 5 : 4];  // those of no sign
  double wg;

  Total() = default;
  __device__ __forceinline__ explicit Total(const Sums<T, kMode>& s)
      : plain{s.abs_w, s.square_w, s.abs_wg, s.square_wg}, wg(s.wg()) {
    if constexpr (kMode == kFisherToo) plain[4] = s.square_w_fisher;
  }

  static constexpr int kPlain = kMode == kWeights ? 2 : kMode == kGrads ? 4 : 5;

  // Adds the lane's total that is `offset` away (by xor).
  __device__ __forceinline__ void add_from(int offset) {
#pragma unroll
    for (int i = 0; i < kPlain; ++i) {
      plain[i] += __shfl_xor_sync(0xffffffffu, plain[i], offset);
    }
    if constexpr (kMode != kWeights) wg += __shfl_xor_sync(0xffffffffu, wg, offset);
  }

  // Goes on with `other` where `upper` holds, and adds the total that the lane `offset` away,
  // whose `upper` is the opposite, does not go on with.
  __device__ __forceinline__ void merge(const Total& other, bool upper, int offset) {
#pragma unroll
    for (int i = 0; i < kPlain; ++i) {
      plain[i] = (upper ? other.plain[i] : plain[i]) +
                 __shfl_xor_sync(0xffffffffu, upper ? plain[i] : other.plain[i], offset);
    }
    if constexpr (kMode != kWeights) {
      wg = (upper ? other.wg : wg) + __shfl_xor_sync(0xffffffffu, upper ? wg : other.wg, offset);
    }
  }

  // The statistics in their order, to 8 places aligned to 16 bytes.
  __device__ __forceinline__ void write(T* to) const {
    alignas(16) T values[8] = {plain[0], plain[1]};
    if constexpr (kMode != kWeights) {
      values[2] = plain[2];
      values[3] = plain[3];
      values[4] = static_cast<T>(wg);
      values[5] = rest_of(wg, values[4]);
    }
    if constexpr (kMode == kFisherToo) values[6] = plain[4];
    constexpr int kStores = (kMode == kWeights ? 4 : 8) * sizeof(T) / sizeof(uint4);
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(values)[i];
    }
  }
};

}  // namespace orthoreg::cuda
