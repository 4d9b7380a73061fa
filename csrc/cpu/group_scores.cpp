// group_scores on the CPU.
#include "../common/group_scores.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace orthoreg::cpu {
namespace {

template <class T>
void run(const GroupTask& task, T* out) {
  for (int64_t r = 0; r < task.roots; ++r) {
    const int64_t begin = task.starts[r], end = task.starts[r + 1];
    STD_TORCH_CHECK(0 <= begin && begin < end && end <= task.entry_count, "root channel ", r,
                    " has no entries, or none that exist");
    double result = 0;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t tensor = task.entries[e] >> 32, index = task.entries[e] & 0xffffffff;
      STD_TORCH_CHECK(0 <= tensor && tensor < static_cast<int64_t>(task.scores.size()) &&
                          index < task.lengths[tensor],
                      "entry ", e, " is outside the scores");
      const double value = static_cast<const T*>(task.scores[tensor])[index];
      if (e == begin) {
        result = value;
      } else if (task.reduction == Reduction::kMax) {
        result = value > result || value != value ? value : result;
      } else if (task.reduction != Reduction::kFirst) {
        result += value;
      }
    }
    if (task.reduction == Reduction::kMean) result /= static_cast<double>(end - begin);
    out[r] = static_cast<T>(result);
  }
}

Tensor group_scores(std::vector<Tensor> scores, Tensor entries, Tensor starts,
                    std::string reduction) {
  const GroupTask task = read_group_scores(scores, entries, starts, reduction);
  Tensor out = torch::stable::new_empty(scores[0], {task.roots});
  if (is_double(scores)) {
    run(task, static_cast<double*>(out.mutable_data_ptr()));
  } else {
    run(task, static_cast<float*>(out.mutable_data_ptr()));
  }
  return out;
}

}  // namespace
}  // namespace orthoreg::cpu

STABLE_TORCH_LIBRARY_IMPL(orthoreg, CPU, m) {
  m.impl("group_scores", TORCH_BOX(&orthoreg::cpu::group_scores));
}
