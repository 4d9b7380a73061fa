// A fiber per CUDA thread, one host thread, one block at a time.
//
// The best-ranked ready thread runs until it must wait, so threads drift as far apart as their
// barriers allow: round-robin would keep warps in step and hide missing barriers. CUDA_EMU_ORDER
// ranks them: up (default), down, or a seed for a shuffle; the order of the blocks follows it.
// Shared memory starts as NaN; the guards between its variables are checked after each block, and
// poisoned under -fsanitize=address. Under -fsanitize=thread the CUDA threads of a block are
// ordered by barriers and fences alone, so a missing one is reported as a data race, whether or not
// this schedule was hurt by it; shuffles and mma order nothing. Nothing orders one block and the
// next: two teams of fibers with a shared memory each run the blocks by turns (a fiber is too
// expensive to be made for each block), so every even block is checked against every odd one.
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "ptx.h"
#include "report.h"
#include "sanitizers.h"

// Saves the callee-saved registers on the stack it leaves (x86-64 System V) and goes to another.
extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emu {
namespace {

constexpr size_t kStack = 256 * 1024, kWindow = 1 << 20;  // kWindow: around shared memory
constexpr unsigned kMaxThreads = 1024, kBarriers = 16;
constexpr size_t kGuard = 32;  // as in ptx_parse.py

struct Copy {
  uint64_t to, from;
  size_t bytes, taken;
};

struct Thread {
  unsigned id = 0, rank = 0;
  uint3 index{};
  bool done = false;
  Here here{"", 0};
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  sanitizers::Fiber* fiber = nullptr;
  std::vector<std::vector<Copy>> copies;  // cp.async groups, the open one last
};

struct Barrier {
  std::vector<Thread*> waiting;
  unsigned arrived = 0, phase = 0;
  Here first{"", 0};
  // Two of each: a fast thread may arrive at the next phase before a slow one leaves this one.
  char tag[2];
  Votes votes[2]{};
};

struct Exchange {
  Barrier barrier;
  unsigned char values[2][32][Values::kMax];
};

struct Unwind {};  // thrown through a thread that is not to go on

struct Team {
  std::vector<Thread> threads;
  std::deque<sanitizers::Fiber> fibers;  // kept from launch to launch: expensive under tsan
  std::vector<Thread*> by_rank;
  std::bitset<kMaxThreads> ready;  // by rank
  std::array<Barrier, kBarriers> barriers;
  std::vector<std::map<unsigned, Exchange>> warps;  // by mask
  unsigned char* window = nullptr;
  unsigned char* shared = nullptr;
  char* stacks = nullptr;
  char tag;  // orders the blocks of one team
};

constexpr size_t kTeams = sanitizers::kFindsRaces ? 2 : 1;

struct State {
  std::mutex busy;
  Team teams[kTeams];
  Team* team = teams;
  Thread* self = nullptr;
  std::function<void()> kernel;
  std::string error;
  bool unwinding = false;
  void* main_pointer = nullptr;
  sanitizers::Fiber main_fiber;
  char fence_tag, start_tag;
};
State& s = *new State;  // never destroyed: it would look like a race with the fibers' last reads

void enter(Thread& t) {
  s.self = &t;
  threadIdx = t.index;
  sanitizers::switching(s.main_fiber, *t.fiber, t.stack, kStack, false);
  emu_switch(&s.main_pointer, t.stack_pointer);
  sanitizers::switched(s.main_fiber, nullptr);
}

// Back to the scheduler. Throws when the launch was given up meanwhile.
void leave(bool for_good = false) {
  Thread& t = *s.self;
  sanitizers::switching(*t.fiber, s.main_fiber, nullptr, 0, for_good);
  emu_switch(&t.stack_pointer, s.main_pointer);
  sanitizers::switched(*t.fiber, &s.main_fiber);
  if (s.unwinding) throw Unwind{};
}

void thread_main() {
  sanitizers::switched(*s.self->fiber, &s.main_fiber);
  if (!s.unwinding) {
    sanitizers::acquire(&s.start_tag);
    sanitizers::acquire(&s.team->tag);
    try {
      s.kernel();
    } catch (const Unwind&) {
    }
    sanitizers::release(&s.team->tag);
  }
  {
    sanitizers::Unseen u;
    s.self->done = true;
    s.team->ready.reset(s.self->rank);
  }
  for (;;) leave(true);
}

// A thread waits at `barrier` until `expected` arrived. `orders`: does it order memory, too, or
// only execution? `one_place`: must all of them come from the same line?
void arrive(Barrier& barrier, unsigned expected, bool orders, bool one_place, bool wait, Here h) {
  Thread& t = *s.self;
  t.here = h;
  if (barrier.arrived == 0) {
    barrier.first = h;
  } else if (one_place &&
             (barrier.first.line != h.line || std::strcmp(barrier.first.file, h.file) != 0)) {
    fail(h, "divergent barrier: other threads wait at " + text(barrier.first));
  }
  void* tag = &barrier.tag[barrier.phase & 1];
  if (orders) sanitizers::release(tag);
  if (++barrier.arrived < expected) {
    if (!wait) return;
    barrier.waiting.push_back(&t);
    s.team->ready.reset(t.rank);
    leave();
  } else {
    for (Thread* w : barrier.waiting) s.team->ready.set(w->rank);
    barrier.waiting.clear();
    barrier.arrived = 0;
    ++barrier.phase;
  }
  if (orders && wait) sanitizers::acquire(tag);
}

Exchange& group(Here h, unsigned& mask) {
  const unsigned warp = s.self->id / 32, n = unsigned(s.team->threads.size()) - 32 * warp;
  if (n < 32) mask &= (1u << n) - 1;
  if (!(mask >> lane() & 1)) fail(h, "the lane is not in its own mask");
  return s.team->warps[warp][mask];
}

void start_thread(Thread& t) {
  t.done = false;
  t.here = {"start", 0};
  t.copies.assign(1, {});
  s.team->ready.set(t.rank);
  auto** top = reinterpret_cast<void**>(t.stack + kStack);
  top[-2] = reinterpret_cast<void*>(thread_main);
  t.stack_pointer = top - 8;  // six registers below the return address
}

// Resumes every unfinished thread so that it throws out of wherever it waits.
void unwind() {
  s.unwinding = true;
  for (Thread& t : s.team->threads) {
    if (!t.done) enter(t);
  }
  s.unwinding = false;
}

std::string stuck_threads() {
  std::map<std::string, int> stuck;
  size_t returned = 0;
  for (const Thread& t : s.team->threads) {
    if (t.done)
      ++returned;
    else
      ++stuck[text(t.here)];
  }
  if (stuck.empty()) return "";
  std::string what = "deadlock: " + std::to_string(returned) + " threads returned";
  for (const auto& [where, n] : stuck) what += ", " + std::to_string(n) + " wait at " + where;
  return what + " (block " + text(blockIdx) + ")";
}

void run_block(const Kernel& kernel, size_t bytes) {
  Team& team = *s.team;
  sanitizers::poison(team.window, kWindow);
  sanitizers::unpoison(team.shared, bytes);
  sanitizers::unpoison(team.stacks, team.threads.size() * kStack);
  std::memset(team.shared, kGarbage, bytes);
  for (const auto& [name, end] : kernel.shared_ends) sanitizers::poison(team.shared + end, kGuard);
  shared_base = reinterpret_cast<uint64_t>(team.shared);
  dynamic_base = shared_base + kernel.shared_bytes, shared_end = shared_base + bytes;
  for (Thread& t : team.threads) start_thread(t);
  for (Barrier& b : team.barriers) b = {};
  team.warps.assign((team.threads.size() + 31) / 32, {});
  while (team.ready.any() && s.error.empty()) enter(*team.by_rank[team.ready._Find_first()]);
  if (s.error.empty()) s.error = stuck_threads();
  if (!s.error.empty()) unwind();
  sanitizers::unpoison(team.shared, bytes);
  for (const auto& [name, end] : kernel.shared_ends) {
    const unsigned char* guard = team.shared + end;
    if (s.error.empty() &&
        std::any_of(guard, guard + kGuard, [](auto c) { return c != kGarbage; })) {
      s.error = "the kernel wrote past the end of " + demangled(name) + " (block " +
                text(blockIdx) + "); build with sanitize=\"address\" for the line";
    }
  }
}

void* map(size_t bytes, int flags) {
  void* p =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("no memory for the emulated threads");
  return p;
}

void set_up(Team& team, dim3 block) {
  if (!team.stacks) {
    team.stacks = static_cast<char*>(map(kMaxThreads * kStack, MAP_NORESERVE));
    // Below 4 GiB, so that a 32-bit shared address is a plain pointer.
    team.window = static_cast<unsigned char*>(map(kWindow, MAP_32BIT));
    team.shared = team.window + kWindow / 4;
  }
  const unsigned n = block.x * block.y * block.z;
  while (team.fibers.size() < n) sanitizers::create(team.fibers.emplace_back());
  team.threads = std::vector<Thread>(n);
  team.by_rank.resize(n);
  team.ready.reset();
  const auto order = ranked(n);
  for (unsigned rank = 0; rank < n; ++rank) {
    Thread& t = team.threads[order[rank]];
    t.id = order[rank], t.rank = rank;
    t.index = {t.id % block.x, t.id / block.x % block.y, t.id / (block.x * block.y)};
    t.stack = team.stacks + t.id * kStack;
    team.by_rank[rank] = &t;
    t.fiber = &team.fibers[t.id];
  }
}

}  // namespace

void launch(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void** args) {
  const std::lock_guard<std::mutex> lock(s.busy);
  sanitizers::Unseen u;
  const uint64_t plane = uint64_t(grid.x) * grid.y;
  const auto blocks = ranked(unsigned(plane * grid.z));
  for (Team& team : s.teams) set_up(team, block);
  sanitizers::current(s.main_fiber);
  s.kernel = [&] { kernel.code(args); };
  s.error.clear();
  gridDim = grid, blockDim = block;
  sanitizers::release(&s.start_tag);
  for (size_t i = 0; i < blocks.size() && s.error.empty(); ++i) {
    const unsigned b = blocks[i];
    blockIdx = {b % grid.x, unsigned(b / grid.x % grid.y), unsigned(b / plane)};
    s.team = &s.teams[i % kTeams];
    run_block(kernel, kernel.shared_bytes + dynamic_bytes);
  }
  for (Team& team : s.teams) sanitizers::acquire(&team.tag);
  if (!s.error.empty()) throw std::runtime_error(s.error + " in kernel " + demangled(kernel.name));
}

void fail(Here h, const std::string& what) {
  {
    sanitizers::Unseen u;
    s.error = text(h) + ": " + what + " (block " + text(blockIdx) + " thread " +
              text(s.self->index) + ")";
  }
  throw Unwind{};
}

void exit_thread() { throw Unwind{}; }

unsigned thread_id() { return s.self->id; }
unsigned block_size() { return unsigned(s.team->threads.size()); }
uint32_t dynamic_size() { return uint32_t(shared_end - dynamic_base); }
uint64_t clock() { return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count()); }
bool is_shared(uint64_t address) { return address >= shared_base && address < shared_end; }

void fence() {
  sanitizers::release(&s.fence_tag);
  sanitizers::acquire(&s.fence_tag);
}

Votes sync_block(Here h, unsigned id, unsigned threads, bool vote) {
  sanitizers::Unseen u;
  const auto all = unsigned(s.team->threads.size());
  if (id >= kBarriers) fail(h, "barrier " + std::to_string(id) + " of 16");
  if (threads % 32)
    fail(h, "barrier of " + std::to_string(threads) + " threads, no multiple of 32");
  Barrier& b = s.team->barriers[id];
  const unsigned expected = threads ? threads : all;
  Votes& votes = b.votes[b.phase & 1];
  if (b.arrived == 0) votes = {0, expected};
  votes.yes += vote;
  arrive(b, expected, true, threads == 0, true, h);
  return votes;
}

void arrive_block(Here h, unsigned id, unsigned threads) {
  sanitizers::Unseen u;
  if (id >= kBarriers) fail(h, "barrier " + std::to_string(id) + " of 16");
  arrive(s.team->barriers[id], threads, true, false, false, h);
}

void sync_warp(Here h, unsigned mask) {
  sanitizers::Unseen u;
  Exchange& e = group(h, mask);
  arrive(e.barrier, unsigned(__builtin_popcount(mask)), true, true, true, h);
}

Values exchange(Here h, unsigned& mask, const void* value, size_t bytes) {
  sanitizers::Unseen u;
  Exchange& e = group(h, mask);
  auto& values = e.values[e.barrier.phase & 1];
  std::memcpy(values[lane()], value, bytes);
  arrive(e.barrier, unsigned(__builtin_popcount(mask)), false, true, true, h);
  return {values};
}

void copy_later(Here h, uint64_t to, uint64_t from, size_t bytes, size_t taken) {
  sanitizers::Unseen u;
  if ((to | from) % bytes) fail(h, "misaligned cp.async of " + std::to_string(bytes) + " bytes");
  if (to < shared_base || to + bytes > shared_end) fail(h, "cp.async to outside shared memory");
  if (taken > bytes) {
    fail(h, "cp.async takes " + std::to_string(taken) + " of " + std::to_string(bytes) + " bytes");
  }
  s.self->copies.back().push_back({to, from, bytes, taken});
}

void copy_commit() {
  sanitizers::Unseen u;
  s.self->copies.emplace_back();
}

// The data land as late as the program allows: at the wait that covers them.
void copy_wait(size_t groups_left) {
  auto& groups = s.self->copies;
  while (groups.size() > groups_left + 1) {
    for (const Copy& c : groups.front()) {
      auto* to = reinterpret_cast<unsigned char*>(c.to);
      std::memcpy(to, reinterpret_cast<const void*>(c.from), c.taken);
      std::memset(to + c.taken, 0, c.bytes - c.taken);
    }
    sanitizers::Unseen u;
    groups.erase(groups.begin());
  }
}

}  // namespace emu

void ptx::bad_access(emu::Here h, uint64_t address, size_t bytes, bool shared) {
  const std::string size = std::to_string(bytes) + " bytes";
  if (address % bytes) emu::fail(h, "misaligned access of " + size);
  if (!shared) emu::fail(h, "access of " + size + " through a null pointer");
  emu::fail(h, "access of " + size + " at byte " +
                   std::to_string(int64_t(address - emu::shared_base)) +
                   ", outside the block's shared memory of " +
                   std::to_string(emu::shared_end - emu::shared_base) + " bytes");
}
