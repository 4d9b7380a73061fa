// What the emulator says to people, and the order in which it runs things.
#pragma once

#include <string>
#include <vector>

#include "engine.h"

namespace emu {

std::string text(Here);   // file:line
std::string text(uint3);  // (x,y,z)
std::string demangled(const char* name);

// 0 ... n - 1 as CUDA_EMU_ORDER ranks them.
std::vector<unsigned> ranked(unsigned n);

}  // namespace emu
