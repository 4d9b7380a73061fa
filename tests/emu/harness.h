// For the test kernels of tests/emu: launchers that ctypes can call, in the emulator and on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <exception>
#include <string>

// What went wrong in `launch`, or null. The emulator throws; a GPU sets an error.
template <class F>
const char* guarded(F launch) {
  static std::string what;
  try {
    launch();
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error == cudaSuccess) return nullptr;
    what = cudaGetErrorString(error);
  } catch (const std::exception& e) {
    what = e.what();
  }
  return what.c_str();
}

// LAUNCHER(name)(parameters) { return guarded([&] { kernel<<<...>>>(...); }); }
#define LAUNCHER(name) extern "C" __attribute__((visibility("default"))) const char* name
