// The entrywise penalties, for the CPU and the CUDA kernels alike. A new one is a functor here, its
// name in Penalties, and a row of the same name in orthoreg_ext/penalties.py.
//
// With G a Gram matrix and r an entry of its residual R:
//   kName       the name used everywhere
//   kDiagonal   R off the diagonal is G; what stands on it, see Diagonal
//   kCosines    R is not G but its cosines G_ij / sqrt(G_ii G_jj), and its diagonal is free; the
//               penalty then is a function of the directions alone
//   kMarked     `pruned` marks filters (the penalty says which pairs count) instead of leaving them
//               out
//   counts(a, b)  with kMarked: whether a pair of filters counts, a and b being marked or not
//   kRoot       P is the root of the sum, and its gradient, that of the sum divided by 2 P, is 0
//               where P is
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

enum class Diagonal {
  kTarget,  // R_ii = G_ii - t_i: 1, or what the filter is given, or 0 where it is pruned
  kFree,    // R_ii = 0, and S_ii = 0
  kKept,    // R_ii = G_ii
};

struct Entrywise {
  static constexpr Diagonal kDiagonal = Diagonal::kTarget;
  static constexpr bool kCosines = false, kMarked = false, kRoot = false;
  ORTHOREG_HOST_DEVICE static bool counts(bool, bool) { return true; }
};

struct AbsoluteResidual : Entrywise {
  static constexpr const char* kName = "orthoreg";
  template <class T>
  ORTHOREG_HOST_DEVICE static T value(T r) {
    return r < T(0) ? -r : r;
  }
  template <class T>
  ORTHOREG_HOST_DEVICE static T slope(T r) {
    return r != r ? r : T(r > T(0)) - T(r < T(0));
  }
};

struct SquaredResidual : Entrywise {
  static constexpr const char* kName = "so";
  template <class T>
  ORTHOREG_HOST_DEVICE static T value(T r) {
    return r * r;
  }
  template <class T>
  ORTHOREG_HOST_DEVICE static T slope(T r) {
    return 2 * r;
  }
};

struct RootOfSquares : SquaredResidual {
  static constexpr const char* kName = "frobenius";
  static constexpr bool kRoot = true;
};

struct SquaredPairs : SquaredResidual {
  static constexpr const char* kName = "offdiag";
  static constexpr Diagonal kDiagonal = Diagonal::kFree;
};

struct SquaredCosines : SquaredPairs {
  static constexpr const char* kName = "cosine";
  static constexpr bool kCosines = true;
};

struct SquaredMarkedPairs : SquaredResidual {
  static constexpr const char* kName = "tpp";
  static constexpr Diagonal kDiagonal = Diagonal::kKept;
  static constexpr bool kMarked = true;
  ORTHOREG_HOST_DEVICE static bool counts(bool a, bool b) { return a || b; }
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
  // Whether the penalty in that place has the trait.
  ORTHOREG_HOST_DEVICE static bool takes_cosines(int id) {
    int i = 0;
    return ((i++ == id && Penalty::kCosines) || ...);
  }
  ORTHOREG_HOST_DEVICE static bool takes_root(int id) {
    int i = 0;
    return ((i++ == id && Penalty::kRoot) || ...);
  }
  static bool marks(const std::string& name) {
    return ((name == Penalty::kName && Penalty::kMarked) || ...);
  }
};

using Penalties = PenaltyList<AbsoluteResidual, SquaredResidual, RootOfSquares, SquaredPairs,
                              SquaredCosines, SquaredMarkedPairs>;

// What the gradient of the sum is multiplied by, from the layer's coefficient and, where the
// penalty is a root, its value.
template <class T>
ORTHOREG_HOST_DEVICE T gradient_factor(T coefficient, const T* root) {
  if (root == nullptr) return 2 * coefficient;
  const T finite = *root - *root;  // else NaN: no gradient of an infinite value is 0
  return *root == 0 ? T(0) : coefficient / *root + finite;
}

// Rows of a Gram matrix in T with a smaller G_ii, which is no normal number, count as zeros where
// cosines are taken: the gradients of theirs are beyond T.
template <class T>
constexpr double kSmallestSquare = sizeof(T) == 8 ? 0x1p-1022 : 0x1p-126;

// Calls visit(Penalty{}) for the penalty of that name; false if there is none.
template <class Visit>
bool visit_penalty(const std::string& name, const Visit& visit) {
  const int id = Penalties::id(name);
  if (id >= 0) Penalties::visit(id, visit);
  return id >= 0;
}

}  // namespace orthoreg
