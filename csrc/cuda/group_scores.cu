// group_scores: one launch for all coupled groups of a network.
#include <memory>

#include "../common/group_scores.h"
#include "group_scores.cuh"
#include "runtime.h"

namespace orthoreg::cuda {
namespace {

static_assert(static_cast<int>(Reduction::kMean) == 1 && static_cast<int>(Reduction::kMax) == 2);

template <class T>
void run(const GroupTask& task, Tensor& out, cudaStream_t stream) {
  const auto tensors = std::make_unique<ScoreTensors>();
  for (size_t i = 0; i < task.scores.size(); ++i) {
    tensors->scores[i] = task.scores[i];
    tensors->lengths[i] = task.lengths[i];
  }
  tensors->count = static_cast<int32_t>(task.scores.size());
  tensors->reduction = static_cast<int32_t>(task.reduction);
  tensors->entries = task.entries;
  tensors->starts = task.starts;
  tensors->entry_count = task.entry_count;
  tensors->roots = task.roots;
  const int64_t blocks = (task.roots + kRootsPerBlock - 1) / kRootsPerBlock;
  group_scores_kernel<T><<<static_cast<unsigned>(blocks), kRootsPerBlock, 0, stream>>>(
      *tensors, static_cast<T*>(out.mutable_data_ptr()));
  ORTHOREG_CUDA_CHECK(cudaGetLastError());
}

Tensor group_scores(std::vector<Tensor> scores, Tensor entries, Tensor starts,
                    std::string reduction) {
  const GroupTask task = read_group_scores(scores, entries, starts, reduction);
  STD_TORCH_CHECK(scores.size() <= kScoreTensors, "at most ", kScoreTensors,
                  " tensors of scores in one call, got ", scores.size());
  const DeviceScope scope(scores[0]);
  Tensor out = torch::stable::new_empty(scores[0], {task.roots});
  if (task.roots == 0) return out;
  const auto launch = is_double(scores) ? run<double> : run<float>;
  launch(task, out, current_stream(scores[0]));
  return out;
}

}  // namespace
}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, ORTHOREG_CUDA_KEY, m) {
  m.impl("group_scores", TORCH_BOX(&orthoreg::cuda::group_scores));
}
