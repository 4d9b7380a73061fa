// Which instruction set the kernels of this process are for.
#pragma once

#include <string>

namespace orthoreg::cpu {

// The widest instruction set of this machine that was compiled, or the one ORTHOREG_EXT_CPU names
// ("generic", "avx2", "avx512"). Throws std::runtime_error where that one cannot run.
const std::string& level();

}  // namespace orthoreg::cpu
