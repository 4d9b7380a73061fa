// One register of the instruction set ORTHOREG_CPU_LEVEL in GCC's and Clang's vector types: loads
// and stores that convert, and the transpose of a square of registers.
//
// Only for the files that are compiled once for each instruction set. Nothing here may be an inline
// function with external linkage (std:: included): the linker could keep the copy of the widest
// instruction set for everybody.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define ORTHOREG_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ORTHOREG_VECTOR_BYTES 32
#else
#define ORTHOREG_VECTOR_BYTES 16
#endif

namespace orthoreg::cpu {
namespace ORTHOREG_CPU_LEVEL {
namespace {

template <class T>
constexpr int kLanes = ORTHOREG_VECTOR_BYTES / sizeof(T);

template <class T, int Lanes = kLanes<T>>
struct VectorOf {
  typedef T Type __attribute__((vector_size(Lanes * sizeof(T)), aligned(alignof(T))));
};
template <class T, int Lanes = kLanes<T>>
using Vector = typename VectorOf<T, Lanes>::Type;

// Stored bits of the 16-bit types.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
using Floats = Vector<float>;
using Words = Vector<uint32_t>;
using HalfWords = Vector<uint16_t, kLanes<float>>;

inline Vector<float> load(const float* p) { return *reinterpret_cast<const Vector<float>*>(p); }
inline Vector<double> load(const double* p) { return *reinterpret_cast<const Vector<double>*>(p); }

inline Floats load(const BFloat16* p) {
  const HalfWords bits = *reinterpret_cast<const HalfWords*>(p);
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

// Exact. (The masked instruction is the one whose header compiles without warnings.) Without one,
// subnormal numbers become normal ones by a subtraction.
inline Floats load(const Half* p) {
  const HalfWords bits = *reinterpret_cast<const HalfWords*>(p);
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  const Words w = __builtin_convertvector(bits, Words) << 16, twice = w + w;
  const Floats normal = reinterpret_cast<Floats>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const Floats subnormal = reinterpret_cast<Floats>((twice >> 17) | (126u << 23)) - 0.5f;
  const Words magnitude =
      twice < (1u << 27) ? reinterpret_cast<Words>(subnormal) : reinterpret_cast<Words>(normal);
  return reinterpret_cast<Floats>((w & 0x80000000u) | magnitude);
#endif
}

inline void store(Floats v, float* p) { *reinterpret_cast<Floats*>(p) = v; }
inline void store(Vector<double> v, double* p) { *reinterpret_cast<Vector<double>*>(p) = v; }

// To the nearest, ties to even, as torch rounds.
inline void store(Floats v, BFloat16* p) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Words all = v != v ? rounded * 0u + 0x7FC0u : rounded;
  *reinterpret_cast<HalfWords*>(p) = __builtin_convertvector(all, HalfWords);
}

// The addition of a number with the right exponent rounds the mantissa to 10 bits.
inline void store(Floats v, Half* p) {
  const Words bits = reinterpret_cast<Words>(v), twice = bits + bits, sign = bits & 0x80000000u;
  const Floats scaled = (reinterpret_cast<Floats>(bits & 0x7FFFFFFFu) * 0x1.0p112f) * 0x1.0p-110f;
  const Words exponent = twice & 0xFF000000u;
  const Words bias = exponent < 0x71000000u ? exponent * 0u + 0x71000000u : exponent;
  const Words sum =
      reinterpret_cast<Words>(reinterpret_cast<Floats>((bias >> 1) + 0x07800000u) + scaled);
  const Words magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0xFFFu);
  const Words all = twice > 0xFF000000u ? magnitude * 0u + 0x7E00u : magnitude;
  *reinterpret_cast<HalfWords*>(p) = __builtin_convertvector((sign >> 16) | all, HalfWords);
}

// As many entries as make one register of Sum.
template <class Sum, class T>
Vector<Sum> load_as(const T* p) {
  using In = Vector<T, kLanes<Sum>>;
  return __builtin_convertvector(*reinterpret_cast<const In*>(p), Vector<Sum>);
}

template <class T, class E>
Vector<T> load_some(const E* p, int64_t count) {
  if (count >= kLanes<T>) return load(p);
  E some[kLanes<T>] = {};
  for (int64_t j = 0; j < count; ++j) some[j] = p[j];
  return load(some);
}

template <class T, class E>
void store_some(Vector<T> v, E* p, int64_t count) {
  if (count >= kLanes<T>) {
    store(v, p);
  } else {
    E some[kLanes<T>];
    store(v, some);
    for (int64_t j = 0; j < count; ++j) p[j] = some[j];
  }
}

template <class T, class E>
T load_one(const E* p) {
  return load_some<T>(p, 1)[0];
}

// ---- the transpose: log2(lanes) rounds that exchange blocks of Size lanes between two registers

template <class T>
struct IndexOf {
  using Type = int32_t;
};
template <>
struct IndexOf<double> {
  using Type = int64_t;
};

template <class T>
struct IndexVector {
  typedef typename IndexOf<T>::Type Type __attribute__((vector_size(sizeof(T) * kLanes<T>)));
};

template <int... Lane>
struct Lanes {};
template <int Count, int... Lane>
struct MakeLanes : MakeLanes<Count - 1, Count - 1, Lane...> {};
template <int... Lane>
struct MakeLanes<0, Lane...> {
  using Type = Lanes<Lane...>;
};

// High = 0: blocks 0, 2, ... of a with those of b between them; High = Size: blocks 1, 3, ...
template <class T, int Size, int High, int... Lane>
inline Vector<T> interleave(Vector<T> a, Vector<T> b, Lanes<Lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b,
                                 ((Lane & Size) ? kLanes<T> + Lane - Size + High : Lane + High)...);
#else
  using Mask = typename IndexVector<T>::Type;
  return __builtin_shuffle(a, b,
                           Mask{((Lane & Size) ? kLanes<T> + Lane - Size + High : Lane + High)...});
#endif
}

template <class T, int Size>
inline void exchange(Vector<T>* rows) {
  if constexpr (Size > 0) {
    using All = typename MakeLanes<kLanes<T>>::Type;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & Size) continue;
      const Vector<T> a = rows[i], b = rows[i + Size];
      rows[i] = interleave<T, Size, 0>(a, b, All{});
      rows[i + Size] = interleave<T, Size, Size>(a, b, All{});
    }
    exchange<T, Size / 2>(rows);
  }
}

template <class T>
inline void transpose(Vector<T>* rows) {  // [lanes]
  exchange<T, kLanes<T> / 2>(rows);
}

}  // namespace
}  // namespace ORTHOREG_CPU_LEVEL
}  // namespace orthoreg::cpu
