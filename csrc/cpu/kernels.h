// The inner loops of the CPU operators. kernels.cpp is compiled once for each instruction set; this
// is what the launchers see of it. No torch, no threads.
#pragma once

#include <cstdint>
#include <string>

namespace orthoreg::cpu {

constexpr int64_t kPanel = 32;   // columns of one product panel
constexpr int64_t kDepth = 256;  // entries that are packed at once
constexpr int64_t kSmall = 8;    // Gram matrices up to this size are summed in double

// An operand: entry (i, j) is at data[i * rows + j * cols].
template <class T>
struct Strided {
  const T* data;
  int64_t rows, cols;

  const T* at(int64_t i, int64_t j) const { return data + i * rows + j * cols; }
};

template <class T>
struct Kernels {
  // C[m, n] = A[m, k] B[k, n] for n <= kPanel; `packed` holds kDepth * kPanel entries.
  void (*product)(Strided<T> a, Strided<T> b, int64_t m, int64_t n, int64_t k, T* c, int64_t ldc,
                  T* packed);
  // out[i * m + j] = sum_p a(i, p) a(j, p) in double, for i, j < m <= kSmall and p < k.
  void (*pairs)(Strided<T> a, int64_t m, int64_t k, double* out);
  // out[i] = sum_p a(i, p)^2 in double, for i < m <= kPanel and p < k.
  void (*squares)(Strided<T> a, int64_t m, int64_t k, double* out);
};

// The widest instruction set of this machine that was compiled, or the one ORTHOREG_EXT_CPU names
// ("generic", "avx2", "avx512"). Throws std::runtime_error where that one cannot run.
const std::string& level();

template <class T>
const Kernels<T>& kernels();

}  // namespace orthoreg::cpu
