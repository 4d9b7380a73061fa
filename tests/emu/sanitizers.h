// What AddressSanitizer and ThreadSanitizer must be told about fibers; nothing in a plain build.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

namespace sanitizers {

struct Fiber {
  void* fake_stack = nullptr;    // asan
  const void* bottom = nullptr;  // asan: the stack of the host thread
  size_t size = 0;               // asan
  void* handle = nullptr;        // tsan
};

#if defined(__SANITIZE_ADDRESS__)

constexpr bool kFindsRaces = false;
inline void create(Fiber&) {}
inline void current(Fiber&) {}
// From one fiber to another, whose stack is given unless it is the host thread's.
inline void switching(Fiber& from, Fiber& to, const void* stack, size_t size, bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, stack ? stack : to.bottom,
                                 stack ? size : to.size);
}
// On arrival; `host`: learns the stack of the host thread, whence a fiber is always entered.
inline void switched(Fiber& self, Fiber* host) {
  __sanitizer_finish_switch_fiber(self.fake_stack, host ? &host->bottom : nullptr,
                                  host ? &host->size : nullptr);
}
inline void poison(void* p, size_t n) { __asan_poison_memory_region(p, n); }
inline void unpoison(void* p, size_t n) { __asan_unpoison_memory_region(p, n); }
inline void release(void*) {}
inline void acquire(void*) {}
struct Unseen {
  Unseen() {}
};

#elif defined(__SANITIZE_THREAD__)

constexpr bool kFindsRaces = true;
inline void create(Fiber& f) { f.handle = __tsan_create_fiber(0); }
inline void current(Fiber& f) { f.handle = __tsan_get_current_fiber(); }
inline void switching(Fiber&, Fiber& to, const void*, size_t, bool) {
  __tsan_switch_to_fiber(to.handle, __tsan_switch_to_fiber_no_sync);
}
inline void switched(Fiber&, Fiber*) {}
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
inline void release(void* tag) { __tsan_release(tag); }
inline void acquire(void* tag) { __tsan_acquire(tag); }
// The engine's own memory is not the kernel's: hide it from the race detector.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

#else

constexpr bool kFindsRaces = false;
inline void create(Fiber&) {}
inline void current(Fiber&) {}
inline void switching(Fiber&, Fiber&, const void*, size_t, bool) {}
inline void switched(Fiber&, Fiber*) {}
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
inline void release(void*) {}
inline void acquire(void*) {}
struct Unseen {
  Unseen() {}
};

#endif

}  // namespace sanitizers
