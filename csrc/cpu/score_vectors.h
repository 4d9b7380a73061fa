// Vectors of numbers in one instruction set, and how entries of every type are read into them: a
// part of score_kernels.cpp, included in the namespace of its level.

constexpr int kWideLanes = ORTHOREG_VECTOR_BYTES / sizeof(double);
typedef double Wide __attribute__((vector_size(ORTHOREG_VECTOR_BYTES), aligned(8)));

typedef float Floats __attribute__((vector_size(ORTHOREG_VECTOR_BYTES), aligned(4)));
typedef uint32_t Bits32 __attribute__((vector_size(ORTHOREG_VECTOR_BYTES), aligned(4)));
typedef uint64_t Bits64 __attribute__((vector_size(ORTHOREG_VECTOR_BYTES), aligned(8)));
typedef float HalfFloats __attribute__((vector_size(ORTHOREG_VECTOR_BYTES / 2), aligned(4)));
typedef uint16_t Bits16 __attribute__((vector_size(ORTHOREG_VECTOR_BYTES / 2), aligned(2)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Conversions of a vector, which compilers do in pieces if left to them. (The masked forms are
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
Bits32 widen(Bits16 x) {
  return reinterpret_cast<Bits32>(
      _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(x)));
}
Floats from_half(Bits16 x) {
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x)));
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
Bits32 widen(Bits16 x) {
  return reinterpret_cast<Bits32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
}
Floats from_half(Bits16 x) {
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x)));
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
Bits32 widen(Bits16 x) { return __builtin_convertvector(x, Bits32); }
Floats from_half(Bits16 x) {
  typedef int32_t Signed __attribute__((vector_size(ORTHOREG_VECTOR_BYTES)));
  const Bits32 half = widen(x), exponent = half & 0x7c00u, fraction = half & 0x3ffu;
  const Floats small =
      __builtin_convertvector(reinterpret_cast<Signed>(fraction), Floats) * 0x1p-24f;
  const Bits32 normal = ((half & 0x7fffu) << 13) + (112u << 23);
  const Bits32 endless = 0x7f800000u | (fraction << 13);  // infinity, or not a number
  Bits32 magnitude = exponent == 0u ? reinterpret_cast<Bits32>(small) : normal;
  magnitude = exponent == 0x7c00u ? endless : magnitude;
  return reinterpret_cast<Floats>(magnitude | ((half & 0x8000u) << 16));
}
#endif

// Computing in T: V holds kLanes numbers, in double they are kParts vectors.
template <class T>
struct Vectors;

template <>
struct Vectors<float> {
  static constexpr int kLanes = ORTHOREG_VECTOR_BYTES / 4, kParts = 2;
  typedef Floats V;

  static V abs(V x) { return reinterpret_cast<V>(reinterpret_cast<Bits32>(x) & 0x7fffffffu); }
  static Wide part(V x, int i) { return widen(i == 0 ? low(x) : high(x)); }
};

template <>
struct Vectors<double> {
  static constexpr int kLanes = kWideLanes, kParts = 1;
  typedef Wide V;

  static V abs(V x) {
    return reinterpret_cast<V>(reinterpret_cast<Bits64>(x) & 0x7fffffffffffffffu);
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
  static Floats vector(const float* p) { return *reinterpret_cast<const Floats*>(p); }
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
  static Wide vector(const double* p) { return *reinterpret_cast<const Wide*>(p); }
  static Wide product(const double*, const double*, Wide y, int) { return y; }
};

template <>
struct Read<Half> {
  using T = float;
  static Floats vector(const Half* p) { return from_half(*reinterpret_cast<const Bits16*>(p)); }
  static Wide product(const Half*, const Half*, Floats y, int i) {
    return Vectors<float>::part(y, i);
  }
};

template <>
struct Read<BFloat16> {
  using T = float;
  static Floats vector(const BFloat16* p) {
    return reinterpret_cast<Floats>(widen(*reinterpret_cast<const Bits16*>(p)) << 16);
  }
  static Wide product(const BFloat16*, const BFloat16*, Floats y, int i) {
    return Vectors<float>::part(y, i);
  }
};
