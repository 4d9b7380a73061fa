// The inner loops of the filter scores. score_kernels.cpp is compiled once for each instruction
// set; this is what the launcher sees of it. No torch, no threads.
#pragma once

#include <cstdint>

namespace orthoreg::cpu {

// What is summed over the entries w of a filter or an input channel, their gradients g and the
// accumulated squares F of the gradients.
enum Statistic { kAbsW, kSquareW, kAbsWg, kWg, kSquareWg, kSquareWFisher, kStatistics };

enum class Element { kFloat, kDouble, kHalf, kBFloat16 };
constexpr int kElements = 4;

constexpr int64_t kScoreLanes = 16;                // column sums are padded to a multiple of this
constexpr int64_t kRowScratch = 16 * kStatistics;  // doubles of scratch memory for each row

// Rows of a matrix in memory, entries of a row side by side, and where their sums go.
struct ScoreBlock {
  const void *w, *g;  // g null: only |w| and w^2 are summed
  void* f;            // float, or double for double entries: F += g^2; null where none is kept
  int64_t w_stride, g_stride, f_stride;  // from one row to the next, in entries
  int64_t rows, columns;
  double* row_sums;       // [rows, kStatistics], written
  double* column_sums;    // [kStatistics, column_stride], written; null where none are wanted
  int64_t column_stride;  // the columns, rounded up to kScoreLanes
  double* scratch;        // [rows, kRowScratch], for column sums
};

using ScoreKernel = void (*)(const ScoreBlock&);

// The kernels for the chosen instruction set, one for each Element.
ScoreKernel score_kernel(Element element);

}  // namespace orthoreg::cpu
