// The inner loops of gram and gram_penalty. gram_kernels.cpp is compiled once for each instruction
// set; this is what the launchers see of it. No torch, no threads.
//
// Operands are packed (those of few rows in another form, see kFew): `lanes` rows of one make a
// sliver, in which entry (r, p) lies at [p * lanes + r]; an operand of `depth` inner entries is
// sliver after sliver. Both factors of a product have this form, so that a Gram matrix needs its
// rows only once. Rows that fill up the last sliver may hold anything.
#pragma once

#include <cstdint>

namespace orthoreg::cpu {

// Inner entries that are packed at once, at most: few enough that what a block reads of both
// operands stays in the first cache, and that float32 sums stay short and so exact.
constexpr int64_t kPackDepth = 96;
constexpr int64_t kEdge = 128;  // rows and columns of a tile, at most; a multiple of every `lanes`
constexpr int64_t kTileStride = kEdge + 16;  // of a tile's rows, which so share no cache sets

// Gram matrices up to this size are made of operands that are packed across: the entries of
// `lanes` columns make a sliver, in which entry (r, c) lies at [r * lanes + c]. What fills up the
// last sliver is 0. There are no products with rows that are not there, and rows of a matrix need
// no shuffles.
constexpr int64_t kFew = 16;         // a multiple of 4, for blocks of pairs are read whole
constexpr int64_t kFewSlivers = 32;  // that are packed at once, so that float32 sums stay short
constexpr int64_t kSmall = 8;        // Gram matrices up to this size are summed in double

// How a number is stored. kComputed is the type that is computed in.
enum class Storage { kComputed, kHalf, kBFloat16 };

// A matrix [n, k + (bias != nullptr)] of one group's filters; pruned ones are read as zeros.
struct Filters {
  const void* weight;
  const void* bias;
  const uint8_t* pruned;  // null, or one a filter
  Storage storage;
  int64_t stride, k;
};

// Where a gradient of such a matrix goes: `factor` times the product is added to it, or replaces
// it. Those of pruned filters stay what they are, or become 0.
template <class T>
struct Target {
  void* weight;
  void* bias;
  const uint8_t* pruned;
  Storage storage;
  int64_t stride, k;
  T factor;
  bool accumulate;
};

// c[rows, columns] = or += A B^T over `depth` inner entries, both packed; c has whole slivers of
// rows and columns. lower: A is B, and only slivers up to the diagonal one are computed.
template <class T>
struct Product {
  const T *a, *b;
  int64_t a_step, b_step;  // from one sliver to the next
  int64_t rows, columns, depth;
  T* c;  // ld is kTileStride
  bool first, lower;
  const Target<T>* target;  // null, or where the sums go next
  int64_t row, column;      // of the target
};

template <class T>
struct GramKernels {
  int64_t lanes;
  // Row r, inner entry p: filter `first` + r, entry `start` + p; r < count, p < depth.
  void (*pack_filters)(const Filters& matrix, int64_t first, int64_t count, int64_t start,
                       int64_t depth, T* packed);
  // Row r, inner entry p: entry `first` + r of filter `start` + p.
  void (*pack_entries)(const Filters& matrix, int64_t first, int64_t count, int64_t start,
                       int64_t depth, T* packed);
  void (*multiply)(const Product<T>& product);
  // Writes a tile of a symmetric matrix [m, m], which starts at (row, column), and its mirror image
  // into the packed matrix. diagonal: row is column, and only the entries on and below the diagonal
  // hold anything. The start is a multiple of `lanes`.
  void (*store_symmetric)(const T* tile, int64_t rows, int64_t columns, bool diagonal, int64_t row,
                          int64_t column, int64_t m, T* packed);
  // sums[r] += sum_p a(r, p)^2, for whole slivers.
  void (*add_squares)(const T* packed, int64_t rows, int64_t depth, double* sums);
  // sums[i * kFew + j] += sum_c a(i, c) a(j, c) for j <= i < rows <= kFew, A packed across.
  void (*add_pairs)(const T* packed, int64_t rows, int64_t slivers, double* sums);
  // out[j * out_stride + i] = in[i * in_stride + j]
  void (*transpose)(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                    int64_t out_stride);
};

template <class T>
const GramKernels<T>& gram_kernels();

}  // namespace orthoreg::cpu
