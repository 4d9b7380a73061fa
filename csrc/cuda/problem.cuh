// What the tiled kernels know of a layer.
#pragma once

#include "../common/plan.h"
#include "device.cuh"

namespace orthoreg::cuda {

// One layer of a launch (see common/layers.h and Item in common/plan.h), 128 bytes.
struct Problem {
  const void *weight, *bias, *targets;
  const uint8_t* pruned;   // or those that the penalty marks
  void *grad, *bias_grad;  // gradient kernels only
  int64_t stride, grad_stride;
  int64_t slopes;  // where its [groups, m, m] starts in the flat buffer
  double offset;   // added to its value
  int32_t n, k;
  int32_t slope_stride;  // from one row of an [m, m] to the next
  int32_t index;         // its place in the coefficients and the values
  int32_t first_unit, units;
  int32_t first_part, slices, slice_length, first_slab;
  int32_t groups;
  Type type;
  bool columns, marks;  // marks: the penalty, which filters `pruned` does not leave out
};
static_assert(sizeof(Problem) == 128);

struct Problems {
  int32_t count, units;
  int32_t penalty;  // its place in Penalties; -1 for plain Gram matrices
  Problem layer[kLayersPerLaunch];
};
static_assert(sizeof(Problems) <= (kLayersPerLaunch > 30 ? 32400 : 3900), "kernel parameter space");

__device__ __forceinline__ int width(const Problem& p) { return p.k + (p.bias != nullptr); }
__device__ __forceinline__ int gram_size(const Problem& p) { return p.columns ? width(p) : p.n; }
__device__ __forceinline__ int inner_size(const Problem& p) { return p.columns ? p.n : width(p); }

// A matrix in memory, rows of contiguous entries; 0 outside.
struct Matrix {
  const void* data;
  const void* last;        // null, or one more column (a bias)
  const uint8_t* dropped;  // null, or 1 for each row that reads as zeros
  int64_t stride;
  int32_t rows, columns;  // columns of data, without the last one
  Type type;

  __device__ __forceinline__ bool has_row(int i) const {
    return i < rows && (dropped == nullptr || dropped[i] == 0);
  }
  // Entry j of a row that is there; j is not beyond the last column.
  template <class T>
  __device__ __forceinline__ T entry(int i, int j) const {
    return j < columns ? load<T>(data, i * stride + j, type) : load<T>(last, i, type);
  }
  __device__ __forceinline__ int width() const { return columns + (last != nullptr); }
};

__device__ __forceinline__ const void* element(const void* data, int64_t i, Type type) {
  const int bytes = type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
  return static_cast<const char*>(data) + i * bytes;
}

// The filter matrix [n, width] of one group.
__device__ __forceinline__ Matrix filters(const Problem& p, int group) {
  const int64_t first = static_cast<int64_t>(group) * p.n;
  return {element(p.weight, first * p.stride, p.type),
          p.bias == nullptr ? nullptr : element(p.bias, first, p.type),
          p.pruned == nullptr || p.marks ? nullptr : p.pruned + first,
          p.stride,
          p.n,
          p.k,
          p.type};
}

// Where S of one group starts.
__device__ __forceinline__ int64_t slopes_at(const Problem& p, int group) {
  return p.slopes + static_cast<int64_t>(group) * gram_size(p) * p.slope_stride;
}

// S, of the computing precision.
template <class T>
__device__ __forceinline__ Matrix slope_matrix(const Problem& p, const T* data) {
  const int m = gram_size(p);
  return {
      data, nullptr, nullptr, p.slope_stride, m, m, sizeof(T) == 8 ? Type::kDouble : Type::kFloat};
}

// A sum of products without visible rounding: near orthonormality what is left of it after the
// subtraction of the target counts. In float two numbers hold it (Ogita, Rump and Oishi, 2005).
template <class T>
struct ExactSum {
  double sum = 0;
  __device__ __forceinline__ void add(T a, T b) {
    sum += static_cast<double>(a) * static_cast<double>(b);
  }
  __device__ __forceinline__ double value() const { return sum; }
};

template <>
struct ExactSum<float> {
  float high = 0, low = 0;
  __device__ __forceinline__ void add(float a, float b) {
    const float product = __fmul_rn(a, b), rest = __fmaf_rn(a, b, -product);
    const float sum = __fadd_rn(high, product), back = __fsub_rn(sum, high);
    const float lost = __fadd_rn(__fsub_rn(high, __fsub_rn(sum, back)), __fsub_rn(product, back));
    high = sum;
    low = __fadd_rn(low, __fadd_rn(lost, rest));
  }
  __device__ __forceinline__ double value() const {
    return static_cast<double>(high) + static_cast<double>(low);
  }
};

}  // namespace orthoreg::cuda
