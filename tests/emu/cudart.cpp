// The part of the CUDA runtime that nvcc-compiled host code calls, over the fiber engine.
//
// A launch that a GPU refuses is refused with the same error code, and the text of that error says
// why. One that nobody asked about fails the next launch: unlike a GPU, tests shall notice.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

#include "report.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using emu::Kernel;

constexpr size_t kSharedDefault = 48 * 1024, kSharedMost = 227 * 1024;

struct Variable {
  void* address;
  size_t bytes;
};

struct Runtime {
  std::map<std::string, Kernel> kernels;
  std::map<std::string, Variable> variables;
  std::map<const void*, std::string> stubs, symbols;  // host address -> name in PTX
  std::map<const void*, size_t> dynamic_limit;        // from cudaFuncSetAttribute
  struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
  } pushed;
  cudaError_t last = cudaSuccess;
  std::string why;  // of the last error
  std::vector<std::string> launches;
};

// Never destroyed: host code unregisters itself after static destructors.
Runtime& runtime() {
  static auto* r = new Runtime;
  return *r;
}

const Kernel& kernel_of(const void* stub) {
  auto& r = runtime();
  const auto found = r.stubs.find(stub);
  if (found == r.stubs.end() || !r.kernels.count(found->second)) {
    throw std::runtime_error(
        "the emulator knows no kernel at this address; was its .cu file given to build()?");
  }
  return r.kernels.at(found->second);
}

cudaError_t refuse(cudaError_t code, const std::string& why) {
  runtime().last = code;
  runtime().why = why;
  return code;
}

std::string text(dim3 d) {
  return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
}

cudaError_t run(const void* stub, dim3 grid, dim3 block, void** args, size_t dynamic) {
  static const bool dry = std::getenv("CUDA_EMU_DRY") != nullptr;
  if (dry) return cudaSuccess;
  auto& r = runtime();
  const Kernel& k = kernel_of(stub);
  const std::string name = "kernel " + emu::demangled(k.name) + ": ";
  if (r.last != cudaSuccess) {
    const std::string unseen = r.why;
    r.last = cudaSuccess;
    throw std::runtime_error("an earlier launch failed and nobody called cudaGetLastError: " +
                             unseen);
  }
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return refuse(cudaErrorInvalidConfiguration, name + "a block of " + text(block) + " threads");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, name + "a grid of " + text(grid) + " blocks");
  }
  if ((k.max_threads && threads > k.max_threads) ||
      (k.exact_threads && threads != k.exact_threads)) {
    return refuse(cudaErrorInvalidValue,
                  name + std::to_string(threads) + " threads, but its __launch_bounds__ say " +
                      std::to_string(k.exact_threads ? k.exact_threads : k.max_threads));
  }
  const auto set = r.dynamic_limit.find(stub);
  const size_t limit = set != r.dynamic_limit.end()
                           ? set->second
                           : kSharedDefault - std::min(kSharedDefault, k.shared_needed);
  if (dynamic > limit) {
    return refuse(cudaErrorInvalidValue, name + std::to_string(dynamic) +
                                             " bytes of dynamic shared memory, but " +
                                             std::to_string(limit) +
                                             " are allowed; call cudaFuncSetAttribute(kernel, "
                                             "cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)");
  }
  r.launches.push_back(k.name);
  emu::launch(k, grid, block, dynamic, args);
  return cudaSuccess;
}

int multiprocessors() {
  const char* set = std::getenv("CUDA_EMU_SMS");
  return set && *set ? std::max(1, std::atoi(set)) : 4;
}

void* symbol_address(const void* symbol, size_t* bytes) {
  auto& r = runtime();
  const auto found = r.symbols.find(symbol);
  if (found == r.symbols.end() || !r.variables.count(found->second)) return nullptr;
  const Variable& v = r.variables.at(found->second);
  if (bytes) *bytes = v.bytes;
  return v.address;
}

}  // namespace

bool emu::add_kernel(Kernel k) {
  const std::string name = k.name;
  runtime().kernels[name] = std::move(k);
  return true;
}
bool emu::add_variable(const char* name, void* address, size_t bytes) {
  runtime().variables[name] = {address, bytes};
  return true;
}

// For tests, through ctypes: the launches since the last reset.
EXPORT void emu_reset_launches() { runtime().launches.clear(); }
EXPORT int emu_launches() { return int(runtime().launches.size()); }
EXPORT const char* emu_launch_name(int i) { return runtime().launches.at(size_t(i)).c_str(); }

extern "C" {

// What nvcc's own registration code calls.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  runtime().stubs[stub] = name;
}
void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t, int, int) {
  runtime().symbols[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  runtime().pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const auto& p = runtime().pushed;
  *grid = p.grid, *block = p.block, *shared = p.shared,
  *static_cast<cudaStream_t*>(stream) = p.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t shared, cudaStream_t) {
  return run(kernel, grid, block, args, shared);
}

// Launches and errors
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t) {
  return run(stub, grid, block, args, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** args) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto id = config->attrs[i].id;
    if (id == cudaLaunchAttributeClusterDimension || id == cudaLaunchAttributeCooperative) {
      return refuse(cudaErrorNotSupported, "clusters and cooperative launches are not emulated");
    }
  }
  return run(stub, config->gridDim, config->blockDim, args, config->dynamicSmemBytes);
}
cudaError_t cudaPeekAtLastError() { return runtime().last; }
cudaError_t cudaGetLastError() { return std::exchange(runtime().last, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidSymbol:
      return "cudaErrorInvalidSymbol";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "another CUDA error";
  }
}
const char* cudaGetErrorString(cudaError_t code) {
  static std::string what;
  what = cudaGetErrorName(code);
  if (code != cudaSuccess) what += " (" + runtime().why + ")";
  return what.c_str();
}

// Kernels and devices
cudaError_t(cudaFuncSetAttribute)(const void* stub, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // hints
  const Kernel& k = kernel_of(stub);
  if (value < 0 || size_t(value) + k.shared_needed > kSharedMost) {
    return refuse(cudaErrorInvalidValue,
                  "kernel " + emu::demangled(k.name) + ": " + std::to_string(value) +
                      " bytes of dynamic shared memory beside " + std::to_string(k.shared_needed) +
                      " static ones, of " + std::to_string(kSharedMost));
  }
  runtime().dynamic_limit[stub] = size_t(value);
  return cudaSuccess;
}
cudaError_t(cudaFuncGetAttributes)(cudaFuncAttributes* out, const void* stub) {
  const Kernel& k = kernel_of(stub);
  *out = {};
  out->sharedSizeBytes = k.shared_needed;
  out->maxThreadsPerBlock = k.max_threads ? int(k.max_threads) : 1024;
  out->numRegs = 32;
  out->binaryVersion = out->ptxVersion = 90;
  const auto set = runtime().dynamic_limit.find(stub);
  out->maxDynamicSharedSizeBytes =
      int(set != runtime().dynamic_limit.end() ? set->second : kSharedDefault - k.shared_needed);
  return cudaSuccess;
}
// By threads and shared memory alone: registers are not known here.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub,
                                                                   int threads, size_t dynamic,
                                                                   unsigned) {
  const size_t shared = kernel_of(stub).shared_needed + dynamic + 1024;
  *blocks = threads > 0 && threads <= 1024 && shared <= kSharedMost + 1024
                ? std::min({2048 / ((threads + 31) / 32 * 32), int(228 * 1024 / shared), 32})
                : 0;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub,
                                                          int threads, size_t dynamic) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, dynamic, 0);
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess
                     : refuse(cudaErrorInvalidDevice, "the emulator has device 0 only");
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 0x7fffffff},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxSharedMemoryPerBlock, int(kSharedDefault)},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(kSharedMost)},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * 1024},
      {cudaDevAttrReservedSharedMemoryPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrComputeCapabilityMajor, EMU_ARCH / 10},
      {cudaDevAttrComputeCapabilityMinor, EMU_ARCH % 10},
      {cudaDevAttrCooperativeLaunch, 0},
      {cudaDevAttrMemoryPoolsSupported, 1},
  };
  if (attribute == cudaDevAttrMultiProcessorCount) return *value = multiprocessors(), cudaSuccess;
  const auto found = known.find(attribute);
  if (found == known.end()) {
    return refuse(cudaErrorInvalidValue, "device attribute " + std::to_string(int(attribute)) +
                                             " is not in tests/emu/cudart.cpp");
  }
  return *value = found->second, cudaSuccess;
}

// Memory: one address space, everything in order and at once
cudaError_t cudaMalloc(void** p, size_t bytes) {
  return *p = std::malloc(std::max<size_t>(bytes, 1)), cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  return std::memset(p, value, bytes), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(p, value, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memmove(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  *p = symbol_address(symbol, nullptr);
  return *p ? cudaSuccess : refuse(cudaErrorInvalidSymbol, "no such __device__ variable");
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind) {
  size_t size = 0;
  auto* to = static_cast<char*>(symbol_address(symbol, &size));
  if (!to || offset + bytes > size)
    return refuse(cudaErrorInvalidSymbol, "no such __device__ variable, or too small");
  return std::memcpy(to + offset, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes,
                                    size_t offset, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                 cudaMemcpyKind) {
  size_t size = 0;
  const auto* from = static_cast<const char*>(symbol_address(symbol, &size));
  if (!from || offset + bytes > size)
    return refuse(cudaErrorInvalidSymbol, "no such __device__ variable, or too small");
  return std::memcpy(to, from + offset, bytes), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
}
