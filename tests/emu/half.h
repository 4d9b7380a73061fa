// f16, bf16, tf32 and pairs of halves, with every conversion rounded once.
#pragma once

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace ptx {

enum class Round { rn, rz, rm, rp, rna, rni, rzi, rmi, rpi };

// Rounds a finite number to a multiple of one: every integer mode and, on a scaled mantissa, every
// other one.
template <Round MODE, class F>
F to_integral(F x) {
  if constexpr (MODE == Round::rz || MODE == Round::rzi) return std::trunc(x);
  if constexpr (MODE == Round::rm || MODE == Round::rmi) return std::floor(x);
  if constexpr (MODE == Round::rp || MODE == Round::rpi) return std::ceil(x);
  if constexpr (MODE == Round::rna) return std::round(x);
  return std::nearbyint(x);
}

// The bits of a float format of `MANTISSA` stored bits and `EXPONENT` exponent bits nearest to x.
// F holds x exactly and has room for a scaled mantissa.
template <int EXPONENT, int MANTISSA, Round MODE, class F>
uint32_t encode(F x) {
  constexpr int bias = (1 << (EXPONENT - 1)) - 1;
  constexpr uint32_t infinity = ((1u << EXPONENT) - 1) << MANTISSA;
  const uint32_t sign = uint32_t(std::signbit(x)) << (EXPONENT + MANTISSA);
  if (std::isnan(x)) return (1u << (EXPONENT + MANTISSA)) - 1;  // what the hardware gives
  if (std::isinf(x)) return sign | infinity;
  if (x == 0) return sign;
  int exponent;
  std::frexp(x, &exponent);
  exponent = std::max(exponent - 1, 1 - bias);  // subnormals share the smallest
  const F scaled = to_integral<MODE>(std::ldexp(x, MANTISSA - exponent));
  // A mantissa that rounds up to the next power of two carries into the exponent by itself.
  const uint64_t bits = (uint64_t(exponent + bias - 1) << MANTISSA) + uint64_t(std::abs(scaled));
  if (bits < infinity) return sign | uint32_t(bits);
  constexpr bool nearest = MODE == Round::rn || MODE == Round::rna;
  const bool away = MODE == Round::rp ? x > 0 : MODE == Round::rm ? x < 0 : nearest;
  return sign | (away ? infinity : infinity - 1);
}

struct f16 {
  static constexpr int kExponent = 5, kMantissa = 10;
  uint16_t bits;
  operator float() const {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    if (exponent == 31) {
      return std::bit_cast<float>(sign | 0x7f800000u | (mantissa ? 0x400000u : 0u) |
                                  mantissa << 13);
    }
    if (exponent) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    return std::copysign(std::ldexp(float(mantissa), -24), sign ? -1.f : 1.f);
  }
};

struct bf16 {
  static constexpr int kExponent = 8, kMantissa = 7;
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

struct tf32 {};  // names a kind of mma operand; lives in 32-bit registers

template <class H>
struct pair {
  H low, high;
};

template <class T>
inline constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
inline constexpr bool is_pair = std::is_same_v<T, pair<f16>> || std::is_same_v<T, pair<bf16>>;
template <class T>
concept Scalar = !is_pair<T>;
template <class T>
inline constexpr bool is_float = std::is_floating_point_v<T> || is_half<T>;

template <class H, Round MODE = Round::rn, class F>
H to_half(F x) {
  return {uint16_t(encode<H::kExponent, H::kMantissa, MODE>(x))};
}

// The sum of two doubles rounded to odd: rounding it again to fewer bits is as good as rounding
// once.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double part = sum - a, error = (a - (sum - part)) + (b - part);
  if (error == 0 || std::bit_cast<uint64_t>(sum) & 1) return sum;
  return std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
}

// cvt.*.tf32.f32
template <Round MODE>
uint32_t to_tf32(float x) {
  return encode<8, 10, MODE>(double(x)) << 13;
}

// cvt: TO from FROM. Integers saturate when they come from floats, and with SATURATE.
template <class TO, Round MODE, bool SATURATE, class FROM>
TO convert(FROM from) {
  if constexpr (is_half<FROM>) {
    if constexpr (std::is_same_v<TO, FROM> && MODE == Round::rn && !SATURATE) return from;
    return convert<TO, MODE, SATURATE>(float(from));
  } else if constexpr (is_half<TO>) {
    using Exact = std::conditional_t<std::is_integral_v<FROM>, long double, double>;
    Exact x = Exact(from);
    if constexpr (MODE >= Round::rni) x = to_integral<MODE>(x);
    if constexpr (SATURATE) x = x > 0 ? std::min(x, Exact(1)) : Exact(0);
    return to_half<TO, MODE >= Round::rni ? Round::rn : MODE>(x);
  } else if constexpr (std::is_floating_point_v<TO>) {
    TO x;
    if constexpr (std::is_same_v<FROM, TO>) {
      x = MODE >= Round::rni ? to_integral<MODE>(from) : from;
    } else if constexpr (MODE == Round::rn || sizeof(TO) > sizeof(FROM)) {
      x = TO(from);
    } else {
      std::fesetround(MODE == Round::rz   ? FE_TOWARDZERO
                      : MODE == Round::rm ? FE_DOWNWARD
                                          : FE_UPWARD);
      volatile FROM source = from;
      volatile TO target = TO(source);
      std::fesetround(FE_TONEAREST);
      x = target;
    }
    if constexpr (SATURATE) x = x > 0 ? std::min(x, TO(1)) : TO(0);
    return x;
  } else if constexpr (std::is_floating_point_v<FROM>) {
    using Limits = std::numeric_limits<TO>;
    if (std::isnan(from)) {
      constexpr bool zero = sizeof(FROM) < 8 && sizeof(TO) < 8;
      return zero ? TO(0) : TO(TO(1) << (8 * sizeof(TO) - 1));
    }
    const FROM x = to_integral<MODE>(from);
    if (x <= FROM(Limits::min())) return Limits::min();
    if (x >= FROM(Limits::max())) return Limits::max();
    return TO(x);
  } else {
    if constexpr (SATURATE) {
      using Limits = std::numeric_limits<TO>;
      if (__int128(from) < __int128(Limits::min())) return Limits::min();
      if (__int128(from) > __int128(Limits::max())) return Limits::max();
    }
    return TO(from);
  }
}

}  // namespace ptx
