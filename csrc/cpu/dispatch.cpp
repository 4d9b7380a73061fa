// Picks the instruction set once a process, and tells Python which.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../common/registration.h"
#include "gram_kernels.h"
#include "score_kernels.h"

namespace orthoreg::cpu {
namespace generic {
extern const GramKernels<float> float_gram_kernels;
extern const GramKernels<double> double_gram_kernels;
extern const ScoreKernel score_kernels[kElements];
}  // namespace generic
#if ORTHOREG_CPU_X86
namespace avx2 {
extern const GramKernels<float> float_gram_kernels;
extern const GramKernels<double> double_gram_kernels;
extern const ScoreKernel score_kernels[kElements];
}  // namespace avx2
namespace avx512 {
extern const GramKernels<float> float_gram_kernels;
extern const GramKernels<double> double_gram_kernels;
extern const ScoreKernel score_kernels[kElements];
}  // namespace avx512
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
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       &avx512::float_gram_kernels, &avx512::double_gram_kernels, avx512::score_kernels},
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c"),
       &avx2::float_gram_kernels, &avx2::double_gram_kernels, avx2::score_kernels},
#endif
      {"generic", true, &generic::float_gram_kernels, &generic::double_gram_kernels,
       generic::score_kernels},
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

std::string cpu_level() { return chosen().name; }

}  // namespace

template <>
const GramKernels<float>& gram_kernels<float>() {
  return *chosen().float_gram_kernels;
}
template <>
const GramKernels<double>& gram_kernels<double>() {
  return *chosen().double_gram_kernels;
}

ScoreKernel score_kernel(Element element) {
  return chosen().score_kernels[static_cast<int>(element)];
}

}  // namespace orthoreg::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(orthoreg, m) { m.def("_cpu_level() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(orthoreg, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&orthoreg::cpu::cpu_level));
}
