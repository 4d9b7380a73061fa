// The entrywise penalties, for the CPU and the CUDA kernels alike. A new one is a functor here, its
// name in Penalties, and a row of the same name in orthoreg_ext/penalties.py.
//
// With r an entry of the residual R of a Gram matrix:
//   kName       the name used everywhere
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

struct AbsoluteResidual {
  static constexpr const char* kName = "orthoreg";
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

struct SquaredResidual {
  static constexpr const char* kName = "so";
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

struct SquaredPairs : SquaredResidual {
  static constexpr const char* kName = "offdiag";
  static constexpr bool kIdentity = false;
};

template <class... Penalty>
struct PenaltyList {
  // The place of a name in the list; -1 if it is not there.
  static int id(const std::string& name) {
    int found = -1, i = 0;
    ((found = name == Penalty::kName ? i : found, ++i), ...);
    return found;
  }
  // Calls visit(Penalty{}) for the penalty in that place.
  template <class Visit>
  ORTHOREG_HOST_DEVICE static void visit(int id, const Visit& visit) {
    int i = 0;
    ((i++ == id ? visit(Penalty{}) : void()), ...);
  }
};

using Penalties = PenaltyList<AbsoluteResidual, SquaredResidual, SquaredPairs>;

// Calls visit(Penalty{}) for the penalty of that name; false if there is none.
template <class Visit>
bool visit_penalty(const std::string& name, const Visit& visit) {
  const int id = Penalties::id(name);
  if (id >= 0) Penalties::visit(id, visit);
  return id >= 0;
}

}  // namespace orthoreg
