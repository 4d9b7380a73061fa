// A CUDA grid on fibers: what translated PTX (ptx2cpp.py) and cudart.cpp call. See engine.cpp.
#pragma once

#include <vector_types.h>  // dim3, uint3: the toolkit's own

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace emu {

struct Here {
  const char* file;
  int line;
};
#define HERE (::emu::Here{__FILE__, __LINE__})

// A translated kernel; `args` holds the addresses of its parameters.
struct Kernel {
  const char* name;
  void (*code)(void** args);
  size_t shared_bytes;   // static shared memory with the guards between the variables
  size_t shared_needed;  // and without, as on a GPU
  std::vector<std::pair<const char*, size_t>> shared_ends;  // where each variable's guard starts
  unsigned max_threads, exact_threads;                      // from __launch_bounds__; 0: none
};

// Static initialisers of the translated code call these.
bool add_kernel(Kernel);
bool add_variable(const char* name, void* address, size_t bytes);

// Runs a grid to its end. Throws std::runtime_error with the source line of whatever went wrong.
void launch(const Kernel&, dim3 grid, dim3 block, size_t dynamic_shared_bytes, void** args);

// Ends the calling CUDA thread, and with it the launch, with an error.
[[noreturn]] void fail(Here, const std::string& what);
[[noreturn]] void exit_thread();
[[noreturn]] void assert_failed(Here, void** args);
void print(Here, void** args);

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline uint64_t shared_base, dynamic_base, shared_end;  // below 4 GiB

unsigned thread_id();
inline unsigned lane() { return thread_id() % 32; }
unsigned block_size();
uint32_t dynamic_size();
uint64_t clock();
bool is_shared(uint64_t address);

// Memory written before a fence by one thread is ordered before reads after another's.
void fence();

// How many threads gave a barrier a true vote, of how many.
struct Votes {
  unsigned yes, all;
};
Votes sync_block(Here, unsigned barrier = 0, unsigned threads = 0, bool vote = false);
void arrive_block(Here, unsigned barrier, unsigned threads);
void sync_warp(Here, unsigned mask);

// What every lane of a mask published in one exchange. Orders execution, not memory.
struct Values {
  static constexpr size_t kMax = 32;
  const unsigned char (*lanes)[kMax];
  template <class T>
  T get(unsigned lane) const {
    T value;
    std::memcpy(&value, lanes[lane], sizeof value);
    return value;
  }
};
Values exchange(Here, unsigned& mask, const void* value, size_t bytes);
template <class T>
Values exchange(Here here, unsigned& mask, const T& value) {
  static_assert(sizeof(T) <= Values::kMax);
  return exchange(here, mask, &value, sizeof value);
}

constexpr unsigned char kGarbage = 0xff;  // NaN in every floating-point format

// cp.async: `taken` bytes come from `from`, the rest of `bytes` is zero. The destination is garbage
// from the moment of issue: a read before the wait must not happen to see the data.
void copy_later(Here, uint64_t to, uint64_t from, size_t bytes, size_t taken);
inline void copy_async(Here here, uint64_t to, uint64_t from, size_t bytes, size_t taken) {
  copy_later(here, to, from, bytes, taken);
  for (size_t i = 0; i < bytes; ++i) reinterpret_cast<unsigned char*>(to)[i] = kGarbage;
}
void copy_commit();
void copy_wait(size_t groups_left);

}  // namespace emu
