// PTX instructions in which a warp's lanes meet. All but bar.warp.sync order execution only.
#pragma once

#include "bits.h"

namespace ptx {

inline uint32_t lane_mask_eq() { return 1u << emu::lane(); }
inline uint32_t lane_mask_lt() { return lane_mask_eq() - 1; }
inline uint32_t lane_mask_le() { return lane_mask_lt() | lane_mask_eq(); }
inline uint32_t lane_mask_gt() { return ~lane_mask_le(); }
inline uint32_t lane_mask_ge() { return ~lane_mask_lt(); }

enum class Shuffle { up, down, bfly, idx };

template <Shuffle KIND>
uint32_t shuffle(emu::Here here, uint32_t x, uint32_t b, uint32_t c, uint32_t mask, bool& ok) {
  const emu::Values all = emu::exchange(here, mask, x);
  const int lane = int(emu::lane()), step = int(b & 31);
  const int segment = int(c >> 8 & 31), clamp = int(c & 31);
  const int low = lane & segment, high = low | (clamp & ~segment);
  int from = lane;
  switch (KIND) {
    case Shuffle::up:
      from = lane - step, ok = from >= high;
      break;
    case Shuffle::down:
      from = lane + step, ok = from <= high;
      break;
    case Shuffle::bfly:
      from = lane ^ step, ok = from <= high;
      break;
    case Shuffle::idx:
      from = low | (step & ~segment), ok = from <= high;
      break;
  }
  if (!ok) from = lane;
  if (!(mask >> from & 1)) {
    emu::fail(here, "shuffle reads lane " + std::to_string(from) + ", which is not in its mask");
  }
  return all.get<uint32_t>(unsigned(from));
}

template <class F>
void for_lanes(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(unsigned(__builtin_ctz(mask)));
}

inline uint32_t ballot(emu::Here here, bool vote, uint32_t mask) {
  const emu::Values all = emu::exchange(here, mask, vote);
  uint32_t result = 0;
  for_lanes(mask, [&](unsigned l) { result |= uint32_t(all.get<bool>(l)) << l; });
  return result;
}
inline bool vote_uniform(emu::Here here, bool vote, uint32_t mask) {
  const bool some_yes = ballot(here, vote, mask) != 0, some_no = ballot(here, !vote, mask) != 0;
  return !(some_yes && some_no);
}
template <class T>
uint32_t match_any(emu::Here here, T value, uint32_t mask) {
  const emu::Values all = emu::exchange(here, mask, value);
  uint32_t result = 0;
  for_lanes(mask, [&](unsigned l) { result |= uint32_t(all.get<T>(l) == value) << l; });
  return result;
}
template <class T>
uint32_t match_all(emu::Here here, T value, uint32_t mask) {
  const emu::Values all = emu::exchange(here, mask, value);
  uint32_t same = 0;
  for_lanes(mask, [&](unsigned l) { same |= uint32_t(all.get<T>(l) == value) << l; });
  return same == mask ? mask : 0;
}
template <class T, class F>
T reduce(emu::Here here, T value, uint32_t mask, F f) {
  const emu::Values all = emu::exchange(here, mask, value);
  T result = all.get<T>(unsigned(__builtin_ctz(mask)));
  for_lanes(mask & (mask - 1), [&](unsigned l) { result = T(f(result, all.get<T>(l))); });
  return result;
}

// The sum of `count` exact terms as tensor cores form it, as far as published tests of them tell
// (Fasi et al., 2021): every term is cut off, towards zero, below the last bit that the largest one
// has in a float, and so is the sum. Later hardware keeps a few bits more, so this errs on the safe
// side.
inline float tensor_core_sum(const double* terms, unsigned count) {
  constexpr int kMantissa = 23, kBias = 1023, kSmallest = -126;
  uint64_t largest = 0;
  double plain = 0;
  for (unsigned i = 0; i < count; ++i) {
    largest = std::max(largest, as<uint64_t>(terms[i]) & ~(uint64_t(1) << 63));
    plain += terms[i];
  }
  if (!std::isfinite(plain)) return float(plain);
  const int exponent = std::max(int(largest >> 52) - kBias, kSmallest);
  const double scale = as<double>(uint64_t(kBias + kMantissa - exponent) << 52);
  int64_t sum = 0;  // in units of the last bit
  for (unsigned i = 0; i < count; ++i) sum += int64_t(terms[i] * scale);
  for (int64_t excess = std::abs(sum) >> (kMantissa + 1), bit = 1; excess; excess >>= 1) {
    bit *= 2, sum -= sum % bit;
  }
  return float(double(sum) / scale);
}

// mma.sync.m16n8kK: D = A B + D over a warp. A register of A or B holds PACK consecutive k of one
// row (column); lane 4 r + q holds rows r and r + 8, and columns r, of A and B; of D it holds
// columns 2 q and 2 q + 1. Of TF32 operands the upper 19 bits count; products are exact. As many k
// as a register of all four lanes holds are summed at once (4 of TF32, 8 halves): no hardware that
// has these instructions is known to take fewer.
template <class ELEMENT, size_t A, size_t B>
void mma(emu::Here here, float (&d)[4], const uint32_t (&a)[A], const uint32_t (&b)[B]) {
  static_assert(A == 2 * B);
  constexpr unsigned pack = std::is_same_v<ELEMENT, tf32> ? 1 : 2;
  struct Fragments {
    uint32_t a[A], b[B];
  } mine;
  std::copy(a, a + A, mine.a), std::copy(b, b + B, mine.b);
  unsigned mask = ~0u;
  const emu::Values all = emu::exchange(here, mask, mine);
  if (mask != ~0u) emu::fail(here, "mma needs all 32 lanes of the warp");
  const auto element = [](uint32_t bits, unsigned k) -> double {
    if constexpr (pack == 1)
      return as<float>(bits & ~0x1fffu);
    else
      return float(as<ELEMENT>(uint16_t(bits >> (16 * (k % 2)))));
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = emu::lane() / 4 + i / 2 * 8, column = emu::lane() % 4 * 2 + i % 2;
    for (unsigned step = 0; step < B; ++step) {
      double terms[4 * pack + 1];
      for (unsigned k = 0; k < 4 * pack; ++k) {
        const auto left = all.get<Fragments>(row % 8 * 4 + k / pack).a[row / 8 + 2 * step];
        const auto right = all.get<Fragments>(column * 4 + k / pack).b[step];
        terms[k] = element(left, k) * element(right, k);
      }
      terms[4 * pack] = d[i];
      d[i] = tensor_core_sum(terms, 4 * pack + 1);
    }
  }
}

// ldmatrix: lane l gives the address of row l % 8 of matrix l / 8 (8 x 8 of 16 bits) and receives,
// of each matrix, elements 2 q and 2 q + 1 of row r, where l = 4 r + q (of column r, transposed).
template <bool TRANSPOSED, size_t N>
void load_matrix(emu::Here here, uint64_t address, uint32_t (&d)[N]) {
  unsigned mask = ~0u;
  const emu::Values rows = emu::exchange(here, mask, address);
  if (mask != ~0u) emu::fail(here, "ldmatrix needs all 32 lanes of the warp");
  const unsigned r = emu::lane() / 4, q = emu::lane() % 4;
  for (unsigned m = 0; m < N; ++m) {
    d[m] = 0;
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned row = TRANSPOSED ? 2 * q + e : r, column = TRANSPOSED ? r : 2 * q + e;
      const uint64_t start = rows.get<uint64_t>(8 * m + row);
      check_shared<uint32_t, 4>(here, start);
      d[m] |= uint32_t(memory<uint16_t>(start + 2 * column)) << (16 * e);
    }
  }
}

}  // namespace ptx
