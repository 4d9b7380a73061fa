// The launch plan of the filter scores: which block reads which piece of a layer, and where its
// partial sums go. Host data from shapes alone: for tensors aligned alike, results are the same
// everywhere.
//
// A block of kScoreThreads threads reads `row_slots` rows of each of `group_slots` groups at once,
// one row by `lanes` lanes of a warp with `own` columns each, and does `steps` such steps.
#pragma once

#include <cstdint>

#include "plan.h"

namespace orthoreg {

constexpr int kScoreThreads = 256;

// One launch carries the descriptions of its layers in its parameters: 32 764 bytes from CUDA 12.1
// on (sm_70 and newer), 4 096 before.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kScoreLayersPerLaunch = 36;
#else
constexpr int kScoreLayersPerLaunch = 320;
#endif

constexpr int kRowSlots = 8;         // numbers of a row's partial sums, padded to whole sectors
constexpr int kFinishedAtOnce = 32;  // scores of a block of the second launch

// What a thread holds at once, by the bytes of an element: its columns, whole 16-byte loads, and
// rows. As much as keeps two blocks on a multiprocessor (one where Fisher accumulators join).
constexpr int own_columns(int element) { return element == 2 ? 8 : 4; }
constexpr int own_rows(int element) { return element == 4 ? 4 : 2; }

// Lanes a row: own_rows() to 32. Idle lanes cost instructions, and so do the partial sums of a
// piece: as much as some 16 columns.
inline int score_lanes(int64_t k, int element) {
  const int own = own_columns(element);
  int best = 32;
  int64_t least = INT64_MAX;
  for (int lanes = 32; lanes >= own_rows(element); lanes /= 2) {
    const int64_t pieces = divide_up(k, lanes * own);
    const int64_t cost = pieces * (lanes * own + 16);
    if (cost < least) {
      least = cost;
      best = lanes;
    }
  }
  return best;
}

struct ScorePlan {
  int lanes, row_slots, group_slots, steps;
  int64_t column_blocks, row_blocks, group_blocks;

  int64_t units() const { return column_blocks * row_blocks * group_blocks; }
};

// Of a layer of `groups` matrices [n, k]. Small layers are cut finer: a block of a large one reads
// 32 or 64 KB of weights, which hides the launch of the block and keeps its partial sums small.
inline ScorePlan plan_scores(int64_t groups, int64_t n, int64_t k, int element) {
  ScorePlan plan{};
  const int64_t entries = groups * n * k;
  plan.lanes = score_lanes(k, element);
  plan.steps = own_rows(element) * (entries >= 1 << 17 ? 4 : entries >= 1 << 15 ? 2 : 1);
  const int rows_at_once = kScoreThreads / plan.lanes;
  plan.row_slots = 1;
  while (plan.row_slots < rows_at_once && plan.row_slots < n) plan.row_slots *= 2;
  plan.group_slots = rows_at_once / plan.row_slots;
  plan.column_blocks = divide_up(k, plan.lanes * own_columns(element));
  plan.row_blocks = divide_up(n, plan.row_slots * plan.steps);
  plan.group_blocks = divide_up(groups, plan.group_slots);
  return plan;
}

// The workspace of a layer: kRowSlots numbers for each row and column block, and for each group,
// row block and statistic one number a column.
inline int64_t row_partials(const ScorePlan& plan, int64_t rows) {
  return rows * plan.column_blocks * kRowSlots;
}
inline int64_t column_partials(const ScorePlan& plan, int64_t groups, int64_t k, int statistics) {
  return groups * plan.row_blocks * statistics * k;
}

}  // namespace orthoreg
