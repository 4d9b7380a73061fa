// The entrywise penalties, for the CPU and the CUDA kernels alike. A new one is a functor here, a
// line in visit_penalty, and a row of the same name in orthoreg_ext/penalties.py.
//
// With r an entry of the residual R of a Gram matrix:
//   kIdentity   R = G - I; otherwise R = G without its diagonal, and the diagonal of S is 0
//   value(r)    phi(r), summed over all entries
//   slope(r)    phi'(r), the entry of S; 0 where phi has a kink
#pragma once

#include <string>

#ifdef __CUDACC__
#define ORTHOREG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ORTHOREG_HOST_DEVICE inline
#endif

namespace orthoreg {

struct AbsoluteResidual {  // "orthoreg"
  static constexpr bool kIdentity = true;
  template <class T>
  ORTHOREG_HOST_DEVICE static T value(T r) {
    return r < T(0) ? -r : r;
  }
  template <class T>
  ORTHOREG_HOST_DEVICE static T slope(T r) {
    return r != r ? r : T(r > T(0)) - T(r < T(0));
  }
};

struct SquaredResidual {  // "so"
  static constexpr bool kIdentity = true;
  template <class T>
  ORTHOREG_HOST_DEVICE static T value(T r) {
    return r * r;
  }
  template <class T>
  ORTHOREG_HOST_DEVICE static T slope(T r) {
    return 2 * r;
  }
};

struct SquaredPairs : SquaredResidual {  // "offdiag"
  static constexpr bool kIdentity = false;
};

// Calls visit(Penalty{}) for the penalty of that name; false if there is none.
template <class Visit>
bool visit_penalty(const std::string& name, const Visit& visit) {
  if (name == "orthoreg") return visit(AbsoluteResidual{}), true;
  if (name == "so") return visit(SquaredResidual{}), true;
  if (name == "offdiag") return visit(SquaredPairs{}), true;
  return false;
}

}  // namespace orthoreg
