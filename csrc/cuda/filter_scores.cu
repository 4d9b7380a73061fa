// filter_scores and accumulate_fisher_: two launches for all criteria of all layers.
#include <memory>

#include "../common/scores.h"
#include "filter_scores.cuh"
#include "launch.h"

namespace orthoreg::cuda {
namespace {

static_assert(kMaxScoreCriteria == kMaxCriteria);

int element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

struct Piece {
  ScorePlan plan;
  int64_t rows_at, columns_at;
};

struct Workspace {
  std::vector<Piece> pieces;
  int64_t size;
};

// Partial sums of the rows of all layers first: they are stored 16 bytes at once.
Workspace plan_workspace(const ScoreTask& task, int statistics) {
  Workspace work{{}, 0};
  for (const ScoreLayer& l : task.layers) {
    Piece piece{plan_scores(l.groups, l.n, l.k, element_size(l.dtype)), -1, -1};
    if (scores_rows(task.dim)) {
      piece.rows_at = work.size;
      work.size += row_partials(piece.plan, l.rows());
    }
    work.pieces.push_back(piece);
  }
  if (scores_columns(task.dim)) {
    for (size_t i = 0; i < task.layers.size(); ++i) {
      const ScoreLayer& l = task.layers[i];
      work.pieces[i].columns_at = work.size;
      work.size += column_partials(work.pieces[i].plan, l.groups, l.k, statistics);
    }
  }
  return work;
}

// Whether every row of the layer can be read 16 bytes at once.
bool is_aligned(const ScoreLayer& l, int64_t element, int64_t computing) {
  const auto fits = [](const void* data, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0;
  };
  return l.k * element % 16 == 0 && fits(l.weight, l.stride, element) &&
         (l.grad == nullptr || fits(l.grad, l.grad_stride, element)) &&
         (l.fisher == nullptr || fits(l.fisher, l.fisher_stride, computing));
}

// Calls launch(first layer, last layer, blocks, first unit of layer) for as many layers as fit.
template <class Units, class Describe, class Run>
void for_each_table(size_t count, const Units& units, const Describe& describe, const Run& launch) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  int64_t blocks = 0;
  int held = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t more = units(i);
    STD_TORCH_CHECK(more <= kMaxBlocks, "a layer needs more than 2^31 blocks");
    if (held == kScoreLayersPerLaunch || blocks + more > kMaxBlocks) {
      launch(held, blocks);
      held = 0;
      blocks = 0;
    }
    describe(held++, i, static_cast<int32_t>(blocks));
    blocks += more;
  }
  launch(held, blocks);
}

template <class T, int kMode>
void run(const ScoreTask& task, const Tensor& like, T* out, cudaStream_t stream) {
  constexpr bool kDouble = sizeof(T) == 8;
  const Workspace work = plan_workspace(task, kStatistics<kMode>);
  const Tensor space = torch::stable::new_empty(like, {std::max<int64_t>(work.size, 1)},
                                                kDouble ? ScalarType::Double : ScalarType::Float);
  T* partials = data<T>(space);

  const auto sums = std::make_unique<SumProblems>();
  for_each_table(
      task.layers.size(), [&](size_t i) { return work.pieces[i].plan.units(); },
      [&](int place, size_t i, int32_t first_unit) {
        const ScoreLayer& l = task.layers[i];
        const Piece& piece = work.pieces[i];
        sums->layer[place] = {l.weight,
                              l.grad,
                              l.fisher,
                              l.stride,
                              l.grad_stride,
                              l.fisher_stride,
                              piece.rows_at,
                              piece.columns_at,
                              static_cast<int32_t>(l.groups),
                              static_cast<int32_t>(l.n),
                              static_cast<int32_t>(l.k),
                              first_unit,
                              static_cast<int16_t>(piece.plan.lanes),
                              static_cast<int16_t>(piece.plan.steps),
                              static_cast<int16_t>(piece.plan.row_slots),
                              static_cast<int16_t>(piece.plan.group_slots),
                              is_aligned(l, element_size(l.dtype), sizeof(T)),
                              element_type(l.dtype)};
      },
      [&](int count, int64_t blocks) {
        if (blocks == 0) return;
        sums->count = count;
        // without accumulators, filters alone are summed with fewer registers
        const auto kernel = kMode == kFisherToo || scores_columns(task.dim)
                                ? score_sums_kernel<T, kMode, true>
                                : score_sums_kernel<T, kMode, kMode == kFisherToo>;
        kernel<<<static_cast<unsigned>(blocks), kScoreThreads, 0, stream>>>(*sums, partials);
        ORTHOREG_CUDA_CHECK(cudaGetLastError());
      });

  const auto finish = std::make_unique<FinishProblems>();
  finish->criteria = static_cast<int32_t>(task.criteria.size());
  for (size_t c = 0; c < task.criteria.size(); ++c) {
    finish->criterion[c] = static_cast<int32_t>(task.criteria[c]);
  }
  const auto scored_rows = [&](size_t i) {
    return scores_rows(task.dim) ? task.layers[i].rows() : 0;
  };
  const auto scored_inputs = [&](size_t i) {
    return scores_columns(task.dim) ? task.layers[i].groups * task.layers[i].inputs : 0;
  };
  for_each_table(
      task.layers.size(), [&](size_t i) { return finish_units(scored_rows(i), scored_inputs(i)); },
      [&](int place, size_t i, int32_t first_unit) {
        const ScoreLayer& l = task.layers[i];
        const Piece& piece = work.pieces[i];
        finish->layer[place] = {l.bias,
                                l.bias_grad,
                                piece.rows_at,
                                piece.columns_at,
                                l.first,
                                l.first_inputs,
                                static_cast<int32_t>(scored_rows(i)),
                                static_cast<int32_t>(piece.plan.column_blocks),
                                static_cast<int32_t>(l.inputs),
                                static_cast<int32_t>(l.taps),
                                static_cast<int32_t>(l.k),
                                static_cast<int32_t>(piece.plan.row_blocks),
                                static_cast<int32_t>(scored_inputs(i)),
                                first_unit,
                                l.channels_last(),
                                element_type(l.dtype)};
      },
      [&](int count, int64_t blocks) {
        if (blocks == 0) return;
        finish->count = count;
        finish_scores_kernel<T, kMode><<<static_cast<unsigned>(blocks), kScoreThreads, 0, stream>>>(
            *finish, partials, out, task.total);
        ORTHOREG_CUDA_CHECK(cudaGetLastError());
      });
}

Tensor compute(const ScoreTask& task, const std::vector<Tensor>& weights) {
  const DeviceScope scope(weights[0]);
  const cudaStream_t stream = current_stream(weights[0]);
  Tensor out = torch::stable::new_empty(
      weights[0], {static_cast<int64_t>(task.criteria.size()), task.total}, compute_type(weights));
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    const auto chosen = task.with_fisher  ? run<T, kFisherToo>
                        : task.with_grads ? run<T, kGrads>
                                          : run<T, kWeights>;
    chosen(task, weights[0], data<T>(out), stream);
  };
  is_double(weights) ? launch(double{}) : launch(float{});
  return out;
}

Tensor filter_scores(std::vector<Tensor> weights, std::vector<Tensor> grads,
                     std::vector<Tensor> biases, std::vector<Tensor> bias_grads,
                     std::vector<int64_t> groups, int64_t dim, std::vector<std::string> names) {
  return compute(read_scores(weights, grads, biases, bias_grads, {}, groups, dim, names), weights);
}

Tensor accumulate_fisher(std::vector<Tensor> weights, std::vector<Tensor> grads,
                         std::vector<Tensor> fisher, std::vector<int64_t> groups, int64_t dim,
                         std::vector<std::string> names) {
  return compute(read_fisher_scores(weights, grads, fisher, groups, dim, names), weights);
}

}  // namespace
}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, ORTHOREG_CUDA_KEY, m) {
  m.impl("filter_scores", TORCH_BOX(&orthoreg::cuda::filter_scores));
  m.impl("accumulate_fisher_", TORCH_BOX(&orthoreg::cuda::accumulate_fisher));
}
