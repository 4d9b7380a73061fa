// PTX instructions on the bits of integers. Names follow ptx_ops.py.
#pragma once

#include "ptx.h"

namespace ptx {

template <class T>
T bit_and(T a, T b) {
  return T(a & b);
}
template <class T>
T bit_or(T a, T b) {
  return T(a | b);
}
template <class T>
T bit_xor(T a, T b) {
  return T(a ^ b);
}
template <class T>
T bit_not(T a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return T(~a);
}
template <class T>
T shl(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(x << n);
}
template <class T>
T shr(T x, uint32_t n) {
  if (n < 8 * sizeof(T)) return T(x >> n);
  return x < T(0) ? T(-1) : T(0);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  return uint32_t(((uint64_t(high) << 32 | low) << n) >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n) {
  return uint32_t((uint64_t(high) << 32 | low) >> n);
}
template <class T>
T lop3(T a, T b, T c, uint32_t table) {
  T result = 0;
  for (unsigned k = 0; k < 8; ++k) {
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return result;
}
template <class T>
uint32_t leading_zeros(T x) {
  return x == 0 ? 8 * sizeof(T) : uint32_t(__builtin_clzll(x)) - (64 - 8 * sizeof(T));
}
// The highest bit that is not a copy of the sign; SHIFT: how far it is from the top.
template <bool SHIFT, class T>
uint32_t find_leading(T x) {
  const auto u = Unsigned<T>(std::is_signed_v<T> && x < 0 ? T(~x) : x);
  if (u == 0) return ~0u;
  return SHIFT ? leading_zeros(u) : 8 * sizeof(T) - 1 - leading_zeros(u);
}
template <class T>
T reverse_bits(T x) {
  T result = 0;
  for (unsigned k = 0; k < 8 * sizeof(T); ++k) result = T(result << 1 | (x >> k & 1));
  return result;
}
template <class T>
T extract_bits(T x, uint32_t position, uint32_t length) {
  constexpr unsigned top = 8 * sizeof(T) - 1;
  position &= 255, length &= 255;
  const bool fill =
      std::is_signed_v<T> && length && (x >> std::min(position + length - 1, top) & 1);
  T result = 0;
  for (unsigned k = 0; k <= top; ++k) {
    const bool bit = k < length && position + k <= top ? x >> (position + k) & 1 : fill;
    result |= T(T(bit) << k);
  }
  return result;
}
template <class T>
T insert_bits(T field, T into, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  for (unsigned k = 0; k < length && position + k < 8 * sizeof(T); ++k) {
    const T bit = T(1) << (position + k);
    into = T(field >> k & 1 ? into | bit : into & ~bit);
  }
  return into;
}
// The position of the |n|-th set bit of mask counted from `base` upwards (n > 0) or downwards.
inline uint32_t find_nth_set(uint32_t mask, uint32_t base, int32_t n) {
  if (n == 0) return mask >> base & 1 ? base : ~0u;
  for (int k = int(base), left = std::abs(n); k >= 0 && k < 32; k += n > 0 ? 1 : -1) {
    if ((mask >> k & 1) && --left == 0) return uint32_t(k);
  }
  return ~0u;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (unsigned k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k), byte = uint32_t(bytes >> (8 * (s & 7))) & 255;
    result |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * k);
  }
  return result;
}
template <class T>
T add_carry(T a, T b, bool in, bool& out) {
  const auto sum = (unsigned __int128)(Unsigned<T>(a)) + Unsigned<T>(b) + in;
  out = sum >> (8 * sizeof(T)) & 1;
  return T(sum);
}
template <class T>
T sub_borrow(T a, T b, bool in, bool& out) {
  const auto difference = (unsigned __int128)(Unsigned<T>(a)) - Unsigned<T>(b) - in;
  out = difference >> (8 * sizeof(T)) & 1;
  return T(difference);
}

}  // namespace ptx
