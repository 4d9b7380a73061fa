// The inner loops of the CPU operators. kernels.cpp is compiled once for each instruction set; this
// is what the launchers see of it. No torch, no threads.
#pragma once

#include <cstdint>
#include <string>

namespace orthoreg::cpu {

// Sums over the entries w and gradients g of one filter.
struct Sums {
  double abs_w = 0, square_w = 0, abs_wg = 0, wg = 0, square_wg = 0;
};

template <class T>
struct Kernels {
  // Adds the sums over `count` consecutive entries; g may be null.
  void (*sums)(const T* w, const T* g, int64_t count, Sums* out);
};

// The widest instruction set of this machine that was compiled, or the one ORTHOREG_EXT_CPU names
// ("generic", "avx2", "avx512"). Throws std::runtime_error where that one cannot run.
const std::string& level();

template <class T>
const Kernels<T>& kernels();

}  // namespace orthoreg::cpu
