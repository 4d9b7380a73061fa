// The inner loops, in GCC's and Clang's vector types, for one instruction set: ORTHOREG_CPU_LEVEL.
//
// Nothing here may be an inline function with external linkage (std:: included): the linker could
// keep the copy of the widest instruction set for everybody.
#include "kernels.h"

namespace orthoreg::cpu {
namespace ORTHOREG_CPU_LEVEL {
namespace {

// In double, where the product of two float32 is exact: the signed sum may cancel.
template <class T, bool Grad>
void sums_of(const T* w, const T* g, int64_t count, Sums* out) {
  constexpr int kLanes = 8;
  typedef T In __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T))));
  typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));
  Wide abs_w = {}, square_w = {}, abs_wg = {}, wg = {}, square_wg = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Wide x = __builtin_convertvector(*reinterpret_cast<const In*>(w + i), Wide);
    abs_w += x < 0 ? -x : x;
    square_w += x * x;
    if constexpr (Grad) {
      const Wide y = __builtin_convertvector(*reinterpret_cast<const In*>(g + i), Wide) * x;
      abs_wg += y < 0 ? -y : y;
      wg += y;
      square_wg += y * y;
    }
  }
  Sums rest;
  for (; i < count; ++i) {
    const double x = w[i];
    rest.abs_w += x < 0 ? -x : x;
    rest.square_w += x * x;
    if constexpr (Grad) {
      const double y = x * g[i];
      rest.abs_wg += y < 0 ? -y : y;
      rest.wg += y;
      rest.square_wg += y * y;
    }
  }
  for (int j = 0; j < kLanes; ++j) {
    rest.abs_w += abs_w[j];
    rest.square_w += square_w[j];
    rest.abs_wg += abs_wg[j];
    rest.wg += wg[j];
    rest.square_wg += square_wg[j];
  }
  out->abs_w += rest.abs_w;
  out->square_w += rest.square_w;
  out->abs_wg += rest.abs_wg;
  out->wg += rest.wg;
  out->square_wg += rest.square_wg;
}

template <class T>
void sums(const T* w, const T* g, int64_t count, Sums* out) {
  if (g == nullptr) {
    sums_of<T, false>(w, g, count, out);
  } else {
    sums_of<T, true>(w, g, count, out);
  }
}

template <class T>
constexpr Kernels<T> kKernels = {&sums<T>};

}  // namespace

extern const Kernels<float> float_kernels = kKernels<float>;
extern const Kernels<double> double_kernels = kKernels<double>;

}  // namespace ORTHOREG_CPU_LEVEL
}  // namespace orthoreg::cpu
