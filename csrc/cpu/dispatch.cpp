// Picks the instruction set once a process, and tells Python which.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../common/registration.h"
#include "gram_kernels.h"
#include "score_kernels.h"

namespace orthoreg::cpu {
// What gram_kernels.cpp and score_kernels.cpp define for an instruction set.
#define ORTHOREG_DECLARE_LEVEL(level)                     \
  namespace level {                                       \
  extern const GramKernels<float> float_gram_kernels;     \
  extern const GramKernels<double> double_gram_kernels;   \
  extern const ScoreKernel score_kernels[kScoreElements]; \
  }
#define ORTHOREG_KERNELS(level) \
  &level::float_gram_kernels, &level::double_gram_kernels, level::score_kernels

ORTHOREG_DECLARE_LEVEL(generic)
#if ORTHOREG_CPU_X86
ORTHOREG_DECLARE_LEVEL(avx2)
ORTHOREG_DECLARE_LEVEL(avx512)
#endif

namespace {

struct Level {
  std::string name;
  bool runs;
  const GramKernels<float>* float_gram_kernels;
  const GramKernels<double>* double_gram_kernels;
  const ScoreKernel* score_kernels;
};

Level choose() {
  const Level levels[] = {
  // the widest first
#if ORTHOREG_CPU_X86
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma"),
       ORTHOREG_KERNELS(avx512)},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
       ORTHOREG_KERNELS(avx2)},
#endif
      {"generic", true, ORTHOREG_KERNELS(generic)},
  };
  const char* forced = std::getenv("ORTHOREG_EXT_CPU");
  std::string names;
  for (const Level& level : levels) {
    if (forced == nullptr || *forced == 0) {
      if (level.runs) return level;
    } else if (level.name == forced) {
      if (level.runs) return level;
      throw std::runtime_error("ORTHOREG_EXT_CPU=" + level.name +
                               ": this processor does not have these instructions");
    }
    names += (names.empty() ? "" : ", ") + level.name;
  }
  throw std::runtime_error("ORTHOREG_EXT_CPU=" + std::string(forced) +
                           " is unknown; valid: " + names);
}

const Level& chosen() {
  static const Level level = choose();
  return level;
}

std::string cpu_level() { return level(); }

}  // namespace

const std::string& level() { return chosen().name; }

template <>
const GramKernels<float>& gram_kernels<float>() {
  return *chosen().float_gram_kernels;
}
template <>
const GramKernels<double>& gram_kernels<double>() {
  return *chosen().double_gram_kernels;
}

ScoreKernel score_kernel(ScoreElement element) {
  return chosen().score_kernels[static_cast<int>(element)];
}

}  // namespace orthoreg::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(orthoreg, m) { m.def("_cpu_level() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(orthoreg, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&orthoreg::cpu::cpu_level));
}
