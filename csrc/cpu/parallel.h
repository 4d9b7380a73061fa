// Threads for the CPU launchers: torch's own pool and its thread setting.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace orthoreg::cpu {

// Calls body(unit, scratch) for every unit; whoever is free takes the next one. What a unit
// computes must not depend on who computes it. `work` is the total in multiply-adds: little work
// stays on one thread. make_scratch() is called once a thread.
template <class MakeScratch, class Body>
void for_each_unit(int64_t units, double work, const MakeScratch& make_scratch, const Body& body) {
  constexpr double kWorthAThread = 5e4;
  const int64_t useful = static_cast<int64_t>(std::min(work / kWorthAThread, 1024.0)) + 1;
  const int64_t threads =
      std::min<int64_t>({units, useful, static_cast<int64_t>(torch::stable::get_num_threads())});
  std::atomic<int64_t> next{0};
  const auto take_units = [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t unit = next++; unit < units; unit = next++) body(unit, scratch);
  };
  if (threads <= 1) {
    take_units(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, take_units);
  }
}

}  // namespace orthoreg::cpu
