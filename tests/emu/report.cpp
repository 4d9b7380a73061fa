#include "report.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>

namespace emu {

std::string text(Here h) { return std::string(h.file) + ":" + std::to_string(h.line); }

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string demangled(const char* name) {
  int status;
  char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = readable ? readable : name;
  std::free(readable);
  return result;
}

std::vector<unsigned> ranked(unsigned n) {
  const char* mode = std::getenv("CUDA_EMU_ORDER");
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (!mode || !*mode || std::strcmp(mode, "up") == 0) return order;
  if (std::strcmp(mode, "down") == 0) {
    std::reverse(order.begin(), order.end());
    return order;
  }
  char* end;
  const unsigned long seed = std::strtoul(mode, &end, 10);
  if (*end) {
    throw std::invalid_argument(std::string("CUDA_EMU_ORDER is '") + mode +
                                "'; expected up, down or a number (the seed of a shuffle)");
  }
  std::shuffle(order.begin(), order.end(), std::mt19937(unsigned(seed)));
  return order;
}

void assert_failed(Here h, void** args) {
  const auto string = [&](int k) { return std::string(*static_cast<const char**>(args[k])); };
  fail(h, "assertion failed: " + string(0));
}

// vprintf(format, arguments): the arguments lie packed, each at a multiple of its own size. Results
// come before parameters in `args`.
void print(Here, void** args) {
  const char* format = *static_cast<const char**>(args[1]);
  const char* packed = *static_cast<const char**>(args[2]);
  size_t at = 0;
  const auto next = [&](auto value) {
    at = (at + sizeof value - 1) / sizeof value * sizeof value;
    std::memcpy(&value, packed + at, sizeof value);
    at += sizeof value;
    return value;
  };
  std::string out;
  while (*format) {
    const size_t plain = std::strcspn(format, "%");
    out.append(format, plain);
    format += plain;
    if (!*format) break;
    const size_t length = std::strcspn(format + 1, "diouxXeEfFgGaAcsp%") + 2;
    const std::string one(format, std::min(length, std::strlen(format)));
    format += one.size();
    char buffer[512] = "%";
    const char kind = one.back();
    if (std::strchr("eEfFgGaA", kind)) {
      std::snprintf(buffer, sizeof buffer, one.c_str(), next(double{}));
    } else if (kind == 's' || kind == 'p') {
      std::snprintf(buffer, sizeof buffer, one.c_str(), next(static_cast<void*>(nullptr)));
    } else if (one.find_first_of("lzjt") != std::string::npos) {
      std::snprintf(buffer, sizeof buffer, one.c_str(), next(int64_t{}));
    } else if (kind != '%') {
      std::snprintf(buffer, sizeof buffer, one.c_str(), next(int{}));
    }
    out += buffer;
  }
  std::fputs(out.c_str(), stderr);
  if (args[0]) *static_cast<int*>(args[0]) = int(out.size());
}

}  // namespace emu
