// What the threads do for a list of layers: units of work, from the shapes alone. A unit is a tile
// of a Gram matrix or of a gradient, or all of some small matrices.
//
// Units are taken in order. The tiles of a gradient wait for the layer's Gram matrix, and between
// the two lie the tiles of the next layer's, so that hardly anyone waits and the weights are still
// cached. Large layers come first and whole small ones last, to even out the end. No unit's result
// depends on who computes it, nor on the other layers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/layers.h"
#include "../common/plan.h"
#include "gram_kernels.h"

namespace orthoreg::cpu {

constexpr int64_t kWholeEdge = 128;  // of the largest matrix that is no more than one unit
static_assert(kWholeEdge <= kEdge, "a thread's memory holds one tile");
constexpr double kWholeWork = 8e6;    // multiply-adds of such a unit
constexpr double kGroupedWork = 1e5;  // groups are put together until there are so many
constexpr int64_t kWholeSlopes = kWholeEdge * kWholeEdge;

struct Range {
  int64_t start, count;
};

// Calls visit(Range) for `size` in runs of at most `most`, as even as multiples of 16 can be.
template <class Visit>
void for_even_ranges(int64_t size, int64_t most, const Visit& visit) {
  if (size == 0) return;
  const int64_t length = divide_up(divide_up(size, divide_up(size, most)), 16) * 16;
  for (int64_t start = 0; start < size; start += length) {
    visit(Range{start, std::min(length, size - start)});
  }
}

enum class UnitKind { kWhole, kGramTile, kGradientTile };

struct Unit {
  UnitKind kind;
  int layer;
  Range groups;         // more than one only where kWhole
  Range rows, columns;  // of the tile
};

// Which of the two a plan is for.
struct Stages {
  bool gram, gradient;
};

struct GramPlan {
  Stages stages;
  int first, last;  // its layers
  std::vector<Unit> units;
  std::vector<int> gram_tiles;  // of each layer, that its gradient waits for
  std::vector<int> first_unit;  // of each layer's Gram tiles, or of its whole units
  std::vector<int64_t> slopes;  // of each layer in the flat buffer; -1: in the thread's scratch
  int64_t slopes_size = 0;
  double work = 0;  // multiply-adds

  // Of one group's slopes; those that nobody else sees are packed, in whole slivers.
  int64_t matrix_size(int64_t m) const {
    return stages.gram && stages.gradient ? divide_up(m, 16) * 16 * m : m * m;
  }
};

inline double gram_work(const Layer& layer) {
  return 0.5 * layer.groups * layer.m() * layer.m() * layer.inner();
}
inline double gradient_work(const Layer& layer) {
  return static_cast<double>(layer.groups) * layer.m() * layer.n * layer.width();
}

inline void add_gram_tiles(const Layer& layer, int l, std::vector<Unit>& out) {
  for (int64_t group = 0; group < layer.groups; ++group) {
    for_even_ranges(layer.m(), kEdge, [&](Range rows) {
      for_even_ranges(layer.m(), kEdge, [&](Range columns) {
        if (columns.start > rows.start) return;
        out.push_back({UnitKind::kGramTile, l, {group, 1}, rows, columns});
      });
    });
  }
}

inline void add_gradient_tiles(const Layer& layer, int l, std::vector<Unit>& out) {
  for (int64_t group = 0; group < layer.groups; ++group) {
    for_even_ranges(layer.width(), kEdge, [&](Range columns) {
      for_even_ranges(layer.n, kEdge, [&](Range rows) {
        out.push_back({UnitKind::kGradientTile, l, {group, 1}, rows, columns});
      });
    });
  }
}

// Layers [first, last) of the list; the others get no units. With both stages, the slopes are
// nobody else's: they lie as close as they can. A layer is whole only where its gradients need no
// more than their own group's penalty (`root`: they need the layer's).
inline GramPlan plan_units(const std::vector<Layer>& layers, Stages stages, bool root, int first,
                           int last) {
  GramPlan plan{stages, first, last, {}, {}, {}, {}};
  plan.gram_tiles.assign(layers.size(), 0);
  plan.first_unit.assign(layers.size(), 0);
  const auto work = [&](int l) {
    return stages.gram * gram_work(layers[l]) + stages.gradient * gradient_work(layers[l]);
  };
  for (const Layer& layer : layers) plan.slopes.push_back(layer.slopes);
  std::vector<int> tiled, whole;
  for (int l = first; l < last; ++l) {
    const bool small = layers[l].m() <= kWholeEdge && !(root && layers[l].groups > 1) &&
                       work(l) <= kWholeWork * static_cast<double>(layers[l].groups);
    (small ? whole : tiled).push_back(l);
    plan.work += work(l);
    if (stages.gram && stages.gradient) {
      plan.slopes[l] = small ? -1 : plan.slopes_size;
      if (!small) plan.slopes_size += layers[l].groups * plan.matrix_size(layers[l].m());
    }
  }
  for (std::vector<int>* list : {&tiled, &whole}) {
    std::stable_sort(list->begin(), list->end(), [&](int a, int b) {
      return work(a) / layers[a].groups > work(b) / layers[b].groups;
    });
  }
  for (size_t i = 0; i <= tiled.size(); ++i) {
    if (stages.gram && i < tiled.size()) {
      const size_t before = plan.units.size();
      plan.first_unit[tiled[i]] = static_cast<int>(before);
      add_gram_tiles(layers[tiled[i]], tiled[i], plan.units);
      plan.gram_tiles[tiled[i]] = static_cast<int>(plan.units.size() - before);
    }
    if (stages.gradient && i > 0)
      add_gradient_tiles(layers[tiled[i - 1]], tiled[i - 1], plan.units);
  }
  for (const int l : whole) {
    const double each = work(l) / std::max<int64_t>(layers[l].groups, 1);
    const int64_t together = static_cast<int64_t>(kGroupedWork / std::max(each, 100.0)) + 1;
    plan.first_unit[l] = static_cast<int>(plan.units.size());
    for (int64_t group = 0; group < layers[l].groups; group += together) {
      const int64_t count = std::min(together, layers[l].groups - group);
      plan.units.push_back({UnitKind::kWhole, l, {group, count}, {}, {}});
    }
  }
  return plan;
}

inline GramPlan plan_all(const std::vector<Layer>& layers, Stages stages) {
  return plan_units(layers, stages, /*root=*/false, 0, static_cast<int>(layers.size()));
}

// Value and gradient, in waves of layers whose slopes fit into `most` bytes together.
inline std::vector<GramPlan> plan_waves(const std::vector<Layer>& layers, bool root,
                                        int64_t element, int64_t most) {
  const GramPlan all = plan_units(layers, {true, true}, root, 0, static_cast<int>(layers.size()));
  std::vector<int64_t> bytes;
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t kept = all.slopes[l] < 0 ? 0 : layers[l].groups * all.matrix_size(layers[l].m());
    bytes.push_back(kept * element);
  }
  const std::vector<int> starts = waves(bytes, most);
  std::vector<GramPlan> out;
  for (size_t w = 0; w + 1 < starts.size(); ++w) {
    out.push_back(plan_units(layers, {true, true}, root, starts[w], starts[w + 1]));
  }
  return out;
}

}  // namespace orthoreg::cpu
