// Grouped Gram matrices with an entrywise epilogue; Tile is SimtTile or TensorTile.
//
// For every layer and group: G = W W^T or W^T W, then S = phi'(R) and sum phi(R) (see
// common/entrywise.h), or G itself: alone, or for cosines.cuh to go on with. A unit of work is one
// tile of the lower triangle, or one slice of its inner entries where they are many; units are
// numbered layer by layer, the dearest first (common/plan.h), and blocks take them in turns.
//   reads 2 kTile rows of W a unit, kTile on the diagonal; writes its tile of S and, off the
//   diagonal, the mirror image
//   cost: m^2 inner / 2 multiply-adds a matrix, and the tiles' overhang; m^2 stores
// Bitwise repeatable on every GPU: a tile is summed in one order, slices are added in their order
// by finish_tiles_kernel, the tiles' parts of the penalty in theirs by finish_penalty_kernel.
#pragma once

#include "cosines.cuh"

namespace orthoreg::cuda {

constexpr int kSmall = 8;   // Gram matrices up to this size are summed exactly altogether
constexpr int kPairs = 64;  // of such a matrix
static_assert(kSmall * kSmall == kPairs);

template <class Tile>
constexpr int kExact = Tile::kTile > kPairs ? Tile::kTile : kPairs;
template <class Tile>
constexpr int kSlabEntries = static_cast<int>(slab_entries(Tile::kTile));

// The tile in shared memory, in the same place as the panels that it was formed from, padded so
// that its columns, too, are read without bank conflicts.
template <class Tile>
constexpr int kTileStride = Tile::kTile + 1;
template <class Tile>
constexpr int kTileBytes =
    Tile::kTile * kTileStride<Tile> * static_cast<int>(sizeof(typename Tile::Number));
template <class Tile>
constexpr int kGramSharedBytes =
    Tile::kSharedBytes > kTileBytes<Tile> ? Tile::kSharedBytes : kTileBytes<Tile>;

// Where a tile lies.
struct GramTile {
  int group, row, column;  // its first entry
  int tile, slice;

  __device__ __forceinline__ bool on_diagonal() const { return row == column; }
};

template <class Tile>
__device__ __forceinline__ GramTile gram_tile(const Problem& p, int unit) {
  const int across = (gram_size(p) + Tile::kTile - 1) / Tile::kTile;
  const int triangle = across * (across + 1) / 2, tile = unit / p.slices;
  int row = 0, column = tile % triangle;
  while (column > row) column -= ++row;
  return {tile / triangle, row * Tile::kTile, column * Tile::kTile, tile, unit % p.slices};
}

// Forms the sums of one unit in `tile` and, on the diagonal, its exact sums in `exact`: those of
// the diagonal, because G - I cancels there, or of all entries of a small matrix, whose error may
// have no other entries to hide behind.
template <class Tile>
__device__ __forceinline__ void form_gram_tile(const Problem& p, const GramTile& at, char* shared,
                                               double* exact) {
  using Number = typename Tile::Number;
  constexpr int kThreads = Tile::kThreads;
  const int begin = at.slice * p.slice_length;
  const int end = min(inner_size(p), begin + p.slice_length);
  __shared__ Matrix w;  // not in registers, which the sums need
  if (threadIdx.x == 0) w = filters(p, at.group);
  __syncthreads();

  // each pair of rows is shared by kThreads / pairs threads, which take runs of the inner entries
  const int pairs = gram_size(p) <= kSmall ? kPairs : Tile::kTile;
  ExactSum<Number> sum;
  const auto each_panel = [&](const auto& panel, int entries) {
    if (!at.on_diagonal()) return;
    const bool small = gram_size(p) <= kSmall;
    const int pair = threadIdx.x % pairs, count = entries * pairs / kThreads;
    const int one = small ? pair / kSmall : pair, other = small ? pair % kSmall : pair;
    const int first = threadIdx.x / pairs * count;
#pragma unroll 4
    for (int i = first; i < first + count; ++i) {
      const int q = panel.turn(i);
      const Number entry = panel(one, q);
      sum.add(entry, small ? panel(other, q) : entry);
    }
  };
  typename Tile::Sums sums = {};
  if (p.columns) {
    Tile::template multiply<false, false>(shared, w, at.row, w, at.column, at.on_diagonal(), begin,
                                          end, each_panel, sums);
  } else {
    Tile::template multiply<true, true>(shared, w, at.row, w, at.column, at.on_diagonal(), begin,
                                        end, each_panel, sums);
  }

  Number* tile = reinterpret_cast<Number*>(shared);
  if (at.on_diagonal()) {  // the shares of a pair, in a fixed order
    double* shares = reinterpret_cast<double*>(shared);
    shares[threadIdx.x] = sum.value();
    __syncthreads();
    if (threadIdx.x < pairs) {
      double total = 0;
      for (int s = 0; s < kThreads / pairs; ++s) total += shares[s * pairs + threadIdx.x];
      exact[threadIdx.x] = total;
    }
    __syncthreads();
  }
  Tile::for_each(sums,
                 [&](int i, int j, Number value) { tile[i * kTileStride<Tile> + j] = value; });
  __syncthreads();
}

// From the sums of a whole tile to its part of S, or of G if there is no penalty or it is one on
// cosines. Returns its part of the penalty in thread 0.
//   matrix: the group's S;  inverse: where 1 / sqrt(G_ii) of the group goes, for cosines only
template <class Tile>
__device__ __forceinline__ double finish_gram_tile(const Problem& p, const GramTile& at,
                                                   int penalty, char* shared, const double* exact,
                                                   typename Tile::Number* matrix, double* inverse) {
  using Number = typename Tile::Number;
  constexpr int kTile = Tile::kTile, kStride = kTileStride<Tile>;
  Number* tile = reinterpret_cast<Number*>(shared);
  const int m = gram_size(p);
  const bool small = m <= kSmall, diagonal = at.on_diagonal();
  const int64_t first = static_cast<int64_t>(at.group) * p.n;
  const uint8_t* flags =  // of G's rows, where these are filters
      p.pruned == nullptr || p.columns ? nullptr : p.pruned + first;
  const auto flagged = [&](int i) { return flags != nullptr && flags[i] != 0; };
  const auto target = [&](int i) {
    return p.targets == nullptr
               ? 1.0
               : static_cast<double>(static_cast<const Number*>(p.targets)[first + i]);
  };
  double part = 0;
#pragma unroll 1
  for (int e = threadIdx.x; e < kTile * kTile; e += Tile::kThreads) {
    const int r = e / kTile, c = e % kTile, i = at.row + r, j = at.column + c;
    if (i >= m || j > i) continue;  // above the diagonal: the mirror image, bit for bit
    const bool summed_exactly = diagonal && (small || r == c);
    const double sum = summed_exactly ? exact[small ? r * kSmall + c : r] : 0;
    Number value = summed_exactly ? static_cast<Number>(sum) : tile[r * kStride + c];
    Penalties::visit(penalty, [&](auto functor) {
      using Penalty = decltype(functor);
      if constexpr (Penalty::kCosines) {
        if (i == j) inverse[i] = inverse_root<Number>(sum);
      } else {
        if (i == j && Penalty::kDiagonal == Diagonal::kTarget) {
          value = static_cast<Number>(sum - (flagged(i) ? 0 : target(i)));
        }
        if ((i == j && Penalty::kDiagonal == Diagonal::kFree) ||
            (Penalty::kMarked && !Penalty::counts(flagged(i), flagged(j)))) {
          value = 0;
        }
        part += (i == j ? 1 : 2) * static_cast<double>(Penalty::value(value));
        value = Penalty::slope(value);
      }
    });
    matrix[static_cast<int64_t>(i) * p.slope_stride + j] = value;
    tile[r * kStride + c] = value;
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < kTile * kTile; e += Tile::kThreads) {
    const int c = e / kTile, r = e % kTile, i = at.row + r, j = at.column + c;
    if (i < m && j < i)
      matrix[static_cast<int64_t>(j) * p.slope_stride + i] = tile[r * kStride + c];
  }
  __shared__ double scratch[Tile::kThreads / 32];
  return penalty < 0 ? 0 : block_sum<Tile::kThreads>(part, scratch);
}

// Finishes a tile for all layers' `out`, and leaves in `parts` what a later launch needs.
template <class Tile>
__device__ __forceinline__ void keep_gram_tile(const Problems& problems, const Problem& p,
                                               const GramTile& at, char* shared,
                                               const double* exact, typename Tile::Number* out,
                                               double* parts) {
  double* inverse = parts + p.first_part + static_cast<int64_t>(at.group) * gram_size(p);
  const double part = finish_gram_tile<Tile>(p, at, problems.penalty, shared, exact,
                                             out + slopes_at(p, at.group), inverse);
  if (threadIdx.x == 0 && problems.penalty >= 0 && !Penalties::takes_cosines(problems.penalty)) {
    parts[p.first_part + at.tile] = part;
  }
}

// out: S (or G) of all layers; parts: one a tile, unused for plain G, or for cosines 1 / sqrt(G_ii)
// of each row; slabs: kSlabEntries a unit of
// a sliced layer.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    gram_kernel(const __grid_constant__ Problems problems, typename Tile::Number* __restrict__ out,
                double* __restrict__ parts, typename Tile::Number* __restrict__ slabs) {
  using Number = typename Tile::Number;
  extern __shared__ __align__(128) char shared[];
  __shared__ double exact[kExact<Tile>];
  __shared__ GramTile at;
  for (int unit = blockIdx.x; unit < problems.units; unit += gridDim.x) {
    const Problem& p = problems.layer[find_layer(problems, unit)];
    if (threadIdx.x == 0) at = gram_tile<Tile>(p, unit - p.first_unit);
    __syncthreads();
    form_gram_tile<Tile>(p, at, shared, exact);
    if (p.slices == 1) {
      keep_gram_tile<Tile>(problems, p, at, shared, exact, out, parts);
    } else {
      Number* slab =
          slabs + static_cast<int64_t>(p.first_slab + unit - p.first_unit) * kSlabEntries<Tile>;
      const Number* tile = reinterpret_cast<const Number*>(shared);
#pragma unroll 1
      for (int e = threadIdx.x; e < Tile::kTile * Tile::kTile; e += Tile::kThreads) {
        slab[e] = tile[e / Tile::kTile * kTileStride<Tile> + e % Tile::kTile];
      }
      double* sums = reinterpret_cast<double*>(slab + Tile::kTile * Tile::kTile);
      if (at.on_diagonal() && threadIdx.x < kExact<Tile>) sums[threadIdx.x] = exact[threadIdx.x];
    }
    __syncthreads();  // shared memory is free again
  }
}

// Adds the slices of the sliced layers' tiles, in their order, and finishes the tiles. One block a
// tile: here a unit is a tile.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    finish_tiles_kernel(const __grid_constant__ Problems problems,
                        typename Tile::Number* __restrict__ out, double* __restrict__ parts,
                        const typename Tile::Number* __restrict__ slabs) {
  using Number = typename Tile::Number;
  extern __shared__ __align__(128) char shared[];
  __shared__ double exact[kExact<Tile>];
  const Problem& p = problems.layer[find_layer(problems, blockIdx.x)];
  const int first = (blockIdx.x - p.first_unit) * p.slices;
  const GramTile at = gram_tile<Tile>(p, first);
  const Number* slab = slabs + static_cast<int64_t>(p.first_slab + first) * kSlabEntries<Tile>;
  Number* tile = reinterpret_cast<Number*>(shared);
#pragma unroll 1
  for (int e = threadIdx.x; e < Tile::kTile * Tile::kTile; e += Tile::kThreads) {
    Number sum = 0;
    for (int s = 0; s < p.slices; ++s) sum += slab[s * kSlabEntries<Tile> + e];
    tile[e / Tile::kTile * kTileStride<Tile> + e % Tile::kTile] = sum;
  }
  if (at.on_diagonal() && threadIdx.x < (gram_size(p) <= kSmall ? kPairs : Tile::kTile)) {
    double sum = 0;
    for (int s = 0; s < p.slices; ++s) {
      sum += reinterpret_cast<const double*>(slab + s * kSlabEntries<Tile> +
                                             Tile::kTile * Tile::kTile)[threadIdx.x];
    }
    exact[threadIdx.x] = sum;
  }
  __syncthreads();
  keep_gram_tile<Tile>(problems, p, at, shared, exact, out, parts);
}

// The layers of a launch of finish_penalty_kernel.
struct Totals {
  struct Layer {
    double offset;
    int32_t first, last;  // its parts
  };
  static constexpr int kMost = kLayersPerLaunch;
  Layer layer[kMost];
};

// values[l] = offset_l + the parts of layer l, in a fixed order, or the root of that. One block a
// layer.
template <class T>
__global__ void __launch_bounds__(128)
    finish_penalty_kernel(const __grid_constant__ Totals totals, const double* __restrict__ parts,
                          bool root, T* __restrict__ values) {
  __shared__ double scratch[4];
  const Totals::Layer& layer = totals.layer[blockIdx.x];
  double sum = 0;
  for (int i = layer.first + threadIdx.x; i < layer.last; i += 128) sum += parts[i];
  sum = block_sum<128>(sum, scratch);
  sum += layer.offset;
  if (threadIdx.x == 0) values[blockIdx.x] = static_cast<T>(root ? sqrt(sum) : sum);
}

}  // namespace orthoreg::cuda
