// The scores of coupled groups, for the CPU and the CUDA launchers.
#pragma once

#include <string>
#include <vector>

#include "layers.h"

namespace orthoreg {

enum class Reduction : int { kSum, kMean, kMax, kFirst };

inline Reduction parse_reduction(const std::string& name) {
  const char* names[] = {"sum", "mean", "max", "first"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<Reduction>(i);
  }
  STD_TORCH_CHECK(false, "no reduction is named '", name, "'");
}

// scores: each [n], all float32 or all float64. Root channel r takes entries[starts[r]] to
// entries[starts[r + 1] - 1] in this order, each (index of a tensor) * 2^32 + (index in it).
struct GroupTask {
  std::vector<const void*> scores;
  std::vector<int32_t> lengths;
  const int64_t *entries, *starts;
  int64_t entry_count, roots;
  Reduction reduction;
};

inline GroupTask read_group_scores(const std::vector<Tensor>& scores, const Tensor& entries,
                                   const Tensor& starts, const std::string& reduction) {
  STD_TORCH_CHECK(!scores.empty(), "an operator needs at least one tensor of scores");
  GroupTask task{{}, {}, nullptr, nullptr, entries.numel(), starts.numel() - 1, {}};
  task.reduction = parse_reduction(reduction);
  for (size_t i = 0; i < scores.size(); ++i) {
    check_tensor(scores[i], scores[0], "scores", i);
    STD_TORCH_CHECK(scores[i].scalar_type() == compute_type(scores) && scores[i].dim() == 1 &&
                        scores[i].is_contiguous() && scores[i].numel() < INT32_MAX,
                    "scores[", i, "] must be a contiguous [n] of float32 or of float64");
    task.scores.push_back(scores[i].const_data_ptr());
    task.lengths.push_back(static_cast<int32_t>(scores[i].numel()));
  }
  for (const Tensor* table : {&entries, &starts}) {
    STD_TORCH_CHECK(table->scalar_type() == ScalarType::Long && table->dim() == 1 &&
                        table->is_contiguous() && table->is_cpu() == scores[0].is_cpu() &&
                        table->get_device_index() == scores[0].get_device_index(),
                    "entries and starts must be contiguous int64 on the device of the scores");
  }
  STD_TORCH_CHECK(task.roots >= 0, "starts must have one entry more than there are root channels");
  task.entries = static_cast<const int64_t*>(entries.const_data_ptr());
  task.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  return task;
}

}  // namespace orthoreg
