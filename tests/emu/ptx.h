// PTX instructions on one thread's registers, as C++ functions. Names follow ptx_ops.py.
#pragma once

#include <algorithm>
#include <bit>

#include "engine.h"
#include "half.h"

namespace ptx {

// Registers are untyped bits: reading one as another kind of number reinterprets, never converts.
template <class T, class R>
T as(R r) {
  if constexpr (std::is_same_v<T, R>) {
    return r;
  } else if constexpr (std::is_integral_v<T> && std::is_integral_v<R>) {
    return T(r);
  } else if constexpr (std::is_integral_v<R> && sizeof(R) > sizeof(T)) {
    return as<T>(std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>(r));
  } else {
    return std::bit_cast<T>(r);
  }
}

// A destination may be wider than the value: it is extended by the value's own sign.
template <class R, class T>
void put(R& r, T value) {
  if constexpr (std::is_integral_v<R> && !std::is_integral_v<T> && sizeof(R) > sizeof(T)) {
    r = as<std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>>(value);
  } else {
    r = as<R>(value);
  }
}

// Memory

template <class T>
T& memory(uint64_t address) {
  return *reinterpret_cast<T*>(address);
}
[[noreturn]] void bad_access(emu::Here, uint64_t address, size_t bytes, bool shared);
template <class T, int N>
void check(emu::Here here, uint64_t address) {
  if (__builtin_expect(address % (sizeof(T) * N) != 0 || address < 0x10000, false)) {
    bad_access(here, address, sizeof(T) * N, false);
  }
}
template <class T, int N>
void check_shared(emu::Here here, uint64_t address) {
  constexpr size_t bytes = sizeof(T) * N;
  const bool inside = address >= emu::shared_base && address + bytes <= emu::shared_end;
  if (__builtin_expect(address % bytes != 0 || !inside, false)) {
    bad_access(here, address, bytes, true);
  }
}
template <class T>
using Bits =
    std::conditional_t<sizeof(T) == 8, uint64_t,
                       std::conditional_t<sizeof(T) == 4, uint32_t,
                                          std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;
template <class T>
T load_atomic(uint64_t address) {
  return as<T>(__atomic_load_n(reinterpret_cast<Bits<T>*>(address), __ATOMIC_RELAXED));
}
template <class T>
void store_atomic(uint64_t address, T value) {
  __atomic_store_n(reinterpret_cast<Bits<T>*>(address), as<Bits<T>>(value), __ATOMIC_RELAXED);
}
// Replaces what was there by `next` of it and gives back what was there.
template <class T, class F>
T atomic(uint64_t address, F next) {
  auto* place = reinterpret_cast<Bits<T>*>(address);
  Bits<T> was = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(place, &was, as<Bits<T>>(next(as<T>(was))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return as<T>(was);
}

// Lifts a function of scalars to pairs of halves.
template <class F, class H, class... P>
pair<H> each(F f, pair<H> a, P... rest) {
  return {f(a.low, rest.low...), f(a.high, rest.high...)};
}
#define LIFT(name)                                                 \
  template <class H, class... P>                                   \
  pair<H> name(pair<H> a, P... rest) {                             \
    return each([](auto... x) { return name(x...); }, a, rest...); \
  }

// Arithmetic. Integers wrap; a half operation is exact and then rounded once.

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <Scalar T>
T add(T a, T b) {
  if constexpr (is_half<T>)
    return to_half<T>(add_to_odd(float(a), float(b)));
  else if constexpr (std::is_integral_v<T>)
    return T(uint64_t(a) + uint64_t(b));
  else
    return a + b;
}
LIFT(add)
template <Scalar T>
T sub(T a, T b) {
  if constexpr (is_half<T>)
    return to_half<T>(add_to_odd(float(a), -float(b)));
  else if constexpr (std::is_integral_v<T>)
    return T(uint64_t(a) - uint64_t(b));
  else
    return a - b;
}
LIFT(sub)
template <Scalar T>
T mul(T a, T b) {
  if constexpr (is_half<T>)
    return to_half<T>(double(float(a)) * float(b));
  else if constexpr (std::is_integral_v<T>)
    return T(uint64_t(a) * uint64_t(b));
  else
    return a * b;
}
LIFT(mul)
template <Scalar T>
T fma(T a, T b, T c) {
  if constexpr (is_half<T>)
    return to_half<T>(add_to_odd(double(float(a)) * float(b), float(c)));
  else if constexpr (std::is_integral_v<T>)
    return add(mul(a, b), c);
  else
    return std::fma(a, b, c);
}
LIFT(fma)

template <class T>
using Wide =
    std::conditional_t<std::is_signed_v<T>,
                       std::conditional_t<sizeof(T) == 8, __int128,
                                          std::conditional_t<sizeof(T) == 4, int64_t, int32_t>>,
                       std::conditional_t<sizeof(T) == 8, unsigned __int128,
                                          std::conditional_t<sizeof(T) == 4, uint64_t, uint32_t>>>;
template <class T>
Wide<T> mul_wide(T a, T b) {
  return Wide<T>(a) * Wide<T>(b);
}
template <class T>
T mul_hi(T a, T b) {
  return T(mul_wide(a, b) >> (8 * sizeof(T)));
}
template <class T>
T mul24(T a, T b) {
  return mul(T(T(uint32_t(a) << 8) >> 8), T(T(uint32_t(b) << 8) >> 8));
}
// What a GPU gives for a zero divisor instead of a trap: all ones, and the dividend.
template <class T>
T div(T a, T b) {
  if constexpr (is_float<T>)
    return T(a / b);
  else if (b == 0)
    return T(~T(0));
  else if (std::is_signed_v<T> && b == T(-1))
    return sub(T(0), a);
  else
    return T(a / b);
}
template <class T>
T rem(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}
template <class T>
bool is_nan(T x) {
  if constexpr (is_float<T>) return std::isnan(float(x));
  return false;
}
template <class T>
T not_a_number() {
  if constexpr (is_half<T>)
    return to_half<T>(NAN);
  else
    return as<T>(Bits<T>(sizeof(T) == 8 ? 0x7ff8000000000000ull : 0x7fffffffu));
}
// PTX orders -0 before +0, and a NaN loses unless .NaN is asked for.
template <bool NAN_WINS, class T>
T minimum(T a, T b) {
  if constexpr (is_pair<T>) {
    return each([](auto x, auto y) { return minimum<NAN_WINS>(x, y); }, a, b);
  } else if constexpr (is_float<T>) {
    if (is_nan(a) || is_nan(b)) {
      return NAN_WINS || (is_nan(a) && is_nan(b)) ? not_a_number<T>() : is_nan(a) ? b : a;
    }
    if (a == 0 && b == 0) return std::signbit(float(a)) ? a : b;
    return b < a ? b : a;
  } else {
    return std::min(a, b);
  }
}
template <class T>
T negate(T x);
template <bool NAN_WINS, class T>
T maximum(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return std::max(a, b);
  else if constexpr (is_pair<T>) {
    return each([](auto x, auto y) { return maximum<NAN_WINS>(x, y); }, a, b);
  } else {
    if (is_nan(a) || is_nan(b)) {
      return NAN_WINS || (is_nan(a) && is_nan(b)) ? not_a_number<T>() : is_nan(a) ? b : a;
    }
    if (a == 0 && b == 0) return std::signbit(float(a)) ? b : a;
    return a < b ? b : a;
  }
}
template <class T>
T negate(T x) {
  if constexpr (is_pair<T>)
    return each([](auto y) { return negate(y); }, x);
  else if constexpr (is_half<T>)
    return {uint16_t(x.bits ^ 0x8000u)};
  else if constexpr (std::is_integral_v<T>)
    return sub(T(0), x);
  else
    return -x;
}
template <class T>
T absolute(T x) {
  if constexpr (is_pair<T>)
    return each([](auto y) { return absolute(y); }, x);
  else if constexpr (is_half<T>)
    return {uint16_t(x.bits & 0x7fffu)};
  else if constexpr (std::is_integral_v<T>)
    return x < 0 ? sub(T(0), x) : x;
  else
    return std::abs(x);
}
template <class T>
T relu(T x) {
  if constexpr (is_pair<T>)
    return each([](auto y) { return relu(y); }, x);
  else if constexpr (is_half<T>)
    return is_nan(x) ? not_a_number<T>() : x.bits & 0x8000u ? T{0} : x;
  else
    return is_nan(x) ? not_a_number<T>() : x > 0 ? x : T(0);
}
template <class T>
T saturate(T x) {
  if constexpr (is_pair<T>)
    return each([](auto y) { return saturate(y); }, x);
  else if constexpr (is_half<T>)
    return to_half<T>(std::min(std::fmax(float(x), 0.f), 1.f));
  else
    return x > 0 ? std::min(x, T(1)) : T(0);
}
template <class T>
T ftz(T x) {
  if constexpr (is_pair<T>)
    return each([](auto y) { return ftz(y); }, x);
  else if constexpr (std::is_same_v<T, f16>)
    return x.bits & 0x7c00u ? x : T{uint16_t(x.bits & 0x8000u)};
  else if constexpr (std::is_same_v<T, bf16>)
    return x.bits & 0x7f80u ? x : T{uint16_t(x.bits & 0x8000u)};
  else if constexpr (std::is_same_v<T, float>)
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
  else
    return x;  // .ftz says nothing about f64
}
template <class T>
T truth(bool yes) {
  if constexpr (is_half<T>)
    return to_half<T>(yes ? 1. : 0.);
  else if constexpr (std::is_floating_point_v<T>)
    return yes ? 1 : 0;
  else
    return yes ? T(~T(0)) : T(0);
}
// The operation under a rounding mode; the barriers keep the compiler from moving it out.
template <int MODE, class F, class... T>
auto rounded(F f, T... x) {
  std::fesetround(MODE);
  const auto hide = [](auto v) {
    volatile auto seen = v;
    return decltype(v)(seen);
  };
  const auto result = hide(f(hide(x)...));
  std::fesetround(FE_TONEAREST);
  return result;
}
template <class T>
T sad(T a, T b, T c) {
  return add(c, T(a > b ? sub(a, b) : sub(b, a)));
}
template <class A, class B, class T>
T dp4a(uint32_t a, uint32_t b, T c) {
  for (int k = 0; k < 32; k += 8) c = add(c, T(T(A(a >> k)) * T(B(b >> k))));
  return c;
}

// Functions: through double for floats and halves, so that the error is the final rounding's.
#define FUNCTION(name, expression)                                \
  template <class T>                                              \
  T name(T a) {                                                   \
    if constexpr (is_pair<T>) {                                   \
      return each([](auto y) { return name(y); }, a);             \
    } else {                                                      \
      const double x = is_half<T> ? double(float(a)) : double(a); \
      if constexpr (is_half<T>)                                   \
        return to_half<T>(double(expression));                    \
      else                                                        \
        return T(expression);                                     \
    }                                                             \
  }
FUNCTION(square_root, std::sqrt(x))
FUNCTION(reciprocal_root, 1 / std::sqrt(x))
FUNCTION(reciprocal, 1 / x)
FUNCTION(exp2_of, std::exp2(x))
FUNCTION(tanh_of, std::tanh(x))
#undef FUNCTION
#undef LIFT

}  // namespace ptx
