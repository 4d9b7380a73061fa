// How much memory the Gram matrices of one call may take.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>

namespace orthoreg {

// The Gram matrices of a call lie in a workspace of at most so many bytes; larger sets of layers
// are worked on in waves. With the threads' panels a call then stays under 256 MB.
// ORTHOREG_EXT_WORKSPACE_MB changes it.
inline int64_t workspace_bytes() {
  constexpr int64_t kWorkspace = 240'000'000;
  const char* text = std::getenv("ORTHOREG_EXT_WORKSPACE_MB");
  if (text == nullptr || *text == '\0') return kWorkspace;
  char* end = nullptr;
  const double megabytes = std::strtod(text, &end);
  STD_TORCH_CHECK(*end == '\0' && megabytes > 0, "ORTHOREG_EXT_WORKSPACE_MB is '", text,
                  "', expected a positive number of megabytes");
  return static_cast<int64_t>(megabytes * (1 << 20));
}

}  // namespace orthoreg
