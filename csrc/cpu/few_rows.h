// Gram matrices of at most kFew rows, packed across (gram_kernels.h): a lane sums its columns, in
// Sum, and as many pairs of rows as a register of these has lanes are turned at once to add up
// theirs. Only for gram_kernels.cpp; the rules of vectors.h hold here, too.
#pragma once

#include "gram_kernels.h"
#include "vectors.h"

namespace orthoreg::cpu {
namespace ORTHOREG_CPU_LEVEL {
namespace {

template <class Sum>
constexpr int kPairColumns = kLanes<Sum> >= 8 ? 4 : 2;
template <class Sum>
constexpr int kPairRows = kLanes<Sum> / kPairColumns<Sum>;

template <class T, class Sum>
void add_block_of_pairs(const T* packed, int64_t rows, int64_t slivers, int64_t i, int64_t j,
                        double* sums) {
  constexpr int kWide = kLanes<Sum>, kHigh = kPairRows<Sum>, kAcross = kPairColumns<Sum>;
  Vector<Sum> sum[kWide] = {};
  for (int64_t s = 0; s < slivers; ++s, packed += rows * kLanes<T>) {
#pragma GCC unroll 2
    for (int part = 0; part < kLanes<T>; part += kWide) {
      Vector<Sum> right[kAcross];
#pragma GCC unroll 4
      for (int c = 0; c < kAcross; ++c)
        right[c] = load_as<Sum>(packed + (j + c) * kLanes<T> + part);
#pragma GCC unroll 4
      for (int r = 0; r < kHigh; ++r) {
        const Vector<Sum> left = load_as<Sum>(packed + (i + r) * kLanes<T> + part);
#pragma GCC unroll 4
        for (int c = 0; c < kAcross; ++c) sum[r * kAcross + c] += left * right[c];
      }
    }
  }
  transpose<Sum>(sum);
#pragma GCC unroll 4
  for (int half = kWide / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int pair = 0; pair < half; ++pair) sum[pair] += sum[pair + half];
  }
  for (int pair = 0; pair < kWide; ++pair) {
    const int64_t row = i + pair / kAcross, column = j + pair % kAcross;
    if (row < rows && column < row) sums[row * kFew + column] += sum[0][pair];
  }
}

// Blocks that reach beyond the last row read the next sliver's, for sums that nobody takes.
template <class T, class Sum>
void add_blocks_of_pairs(const T* packed, int64_t rows, int64_t slivers, double* sums) {
  for (int64_t i = 0; i < rows; i += kPairRows<Sum>) {
    for (int64_t j = 0; j < i + kPairRows<Sum> && j < rows; j += kPairColumns<Sum>) {
      add_block_of_pairs<T, Sum>(packed, rows, slivers, i, j, sums);
    }
  }
}

template <class T>
void add_pairs(const T* packed, int64_t rows, int64_t slivers, double* sums) {
  constexpr int kPart = kLanes<double>, kParts = kLanes<T> / kPart;
  if (rows <= kSmall) {
    add_blocks_of_pairs<T, double>(packed, rows, slivers, sums);
  } else {
    add_blocks_of_pairs<T, T>(packed, rows, slivers, sums);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Vector<double> sum[kParts] = {};
    for (int64_t s = 0; s < slivers; ++s) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        const Vector<double> x =
            load_as<double>(packed + (s * rows + r) * kLanes<T> + part * kPart);
        sum[part] += x * x;
      }
    }
    double& total = sums[r * kFew + r];
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kPart; ++lane) total += sum[part][lane];
    }
  }
}

}  // namespace
}  // namespace ORTHOREG_CPU_LEVEL
}  // namespace orthoreg::cpu
