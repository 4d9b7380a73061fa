// The namespace of the operators and the dispatch key of the CUDA launchers. Both are macros so
// that the tests can register the CUDA kernels, run by an emulator, beside the real operators.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef ORTHOREG_NAMESPACE
#define ORTHOREG_NAMESPACE orthoreg
#endif
#ifndef ORTHOREG_CUDA_KEY
#define ORTHOREG_CUDA_KEY CUDA
#endif

// One level of indirection, so that the macros above are expanded before they are pasted.
#define ORTHOREG_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define ORTHOREG_LIBRARY_FRAGMENT(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define ORTHOREG_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
