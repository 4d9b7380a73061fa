// Numbers of the filter scores in one instruction set: how entries of every type are read, and
// their parts in double. Only for score_kernels.cpp; the rules of vectors.h hold here, too.
#pragma once

#include "vectors.h"

namespace orthoreg::cpu {
namespace ORTHOREG_CPU_LEVEL {
namespace {

constexpr int kWideLanes = kLanes<double>;
using Wide = Vector<double>;
using WideWords = Vector<uint64_t>;
using HalfFloats = Vector<float, kWideLanes>;

// Conversions to double, which compilers do in pieces if left to them. (The masked forms are
// those whose headers compile without warnings.)
#if defined(__AVX512F__)
Wide widen(HalfFloats x) {
  return reinterpret_cast<Wide>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(x)));
}
HalfFloats low(Floats x) {
  return reinterpret_cast<HalfFloats>(
      _mm512_maskz_extractf32x8_ps(0xff, reinterpret_cast<__m512>(x), 0));
}
HalfFloats high(Floats x) {
  return reinterpret_cast<HalfFloats>(
      _mm512_maskz_extractf32x8_ps(0xff, reinterpret_cast<__m512>(x), 1));
}
#elif defined(__AVX2__)
Wide widen(HalfFloats x) {
  return reinterpret_cast<Wide>(_mm256_cvtps_pd(reinterpret_cast<__m128>(x)));
}
HalfFloats low(Floats x) {
  return reinterpret_cast<HalfFloats>(_mm256_castps256_ps128(reinterpret_cast<__m256>(x)));
}
HalfFloats high(Floats x) {
  return reinterpret_cast<HalfFloats>(_mm256_extractf128_ps(reinterpret_cast<__m256>(x), 1));
}
#else
Wide widen(HalfFloats x) { return __builtin_convertvector(x, Wide); }
HalfFloats low(Floats x) {
  HalfFloats half;
  __builtin_memcpy(&half, &x, sizeof(half));
  return half;
}
HalfFloats high(Floats x) {
  HalfFloats half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&x) + sizeof(half), sizeof(half));
  return half;
}
#endif

// Computing in T: V holds kLanes numbers, in double they are kParts vectors.
template <class T>
struct Vectors;

template <>
struct Vectors<float> {
  static constexpr int kLanes = cpu::ORTHOREG_CPU_LEVEL::kLanes<float>, kParts = 2;
  typedef Floats V;

  static V abs(V x) { return reinterpret_cast<V>(reinterpret_cast<Words>(x) & 0x7fffffffu); }
  static Wide part(V x, int i) { return widen(i == 0 ? low(x) : high(x)); }
};

template <>
struct Vectors<double> {
  static constexpr int kLanes = kWideLanes, kParts = 1;
  typedef Wide V;

  static V abs(V x) {
    return reinterpret_cast<V>(reinterpret_cast<WideWords>(x) & 0x7fffffffffffffffu);
  }
  static Wide part(V x, int) { return x; }
};

// How entries of type E are read, to compute in T. product: part i of w g in double, where y is w g
// in T; it is exact unless E is double.
template <class E>
struct Read;

template <>
struct Read<float> {
  using T = float;
  static Floats vector(const float* p) { return load(p); }
  static Wide part(const float* p, int i) {
    return widen(*reinterpret_cast<const HalfFloats*>(p + i * kWideLanes));
  }
  static Wide product(const float* w, const float* g, Floats, int i) {
    return part(w, i) * part(g, i);
  }
};

template <>
struct Read<double> {
  using T = double;
  static Wide vector(const double* p) { return load(p); }
  static Wide product(const double*, const double*, Wide y, int) { return y; }
};

template <>
struct Read<Half> {
  using T = float;
  static Floats vector(const Half* p) { return load(p); }
  static Wide product(const Half*, const Half*, Floats y, int i) {
    return Vectors<float>::part(y, i);
  }
};

template <>
struct Read<BFloat16> {
  using T = float;
  static Floats vector(const BFloat16* p) { return load(p); }
  static Wide product(const BFloat16*, const BFloat16*, Floats y, int i) {
    return Vectors<float>::part(y, i);
  }
};

}  // namespace
}  // namespace ORTHOREG_CPU_LEVEL
}  // namespace orthoreg::cpu
