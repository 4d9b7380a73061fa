// The launch plan of the tiled kernels: which block computes what. Host data, no tensors, from the
// shapes alone (and the bytes a wave may take), so that it, and with it every result, is the same
// whatever GPU runs it.
// _host.build_plan shows it to Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace orthoreg {

// One launch carries the descriptions of its layers in its parameters: 32 764 bytes from CUDA 12.1
// on (sm_70 and newer), 4 096 before.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kLayersPerLaunch = 30;
#else
constexpr int kLayersPerLaunch = 250;
#endif

constexpr int64_t kDepth = 32;  // inner entries that a block takes at a time; slices are multiples

// What is enough to fill a large GPU: units of work, and inner entries to amortise a unit's start.
constexpr int64_t kFewUnits = 128;  // a launch of their own costs more than larger tiles do
constexpr int64_t kEnoughUnits = 512, kEnoughLargeUnits = 264, kShortestSlice = 256;
// Tiles of 128 need half the loads of tiles of 64 but leave fewer units: only for enough work.
constexpr int64_t kWorkOfLargeTiles = 264 * 1024;  // tiles times inner entries
// One block may form a Gram matrix and its share of the gradient while that costs no more than this
// many multiply-adds over all blocks (each block of a layer forms the matrix anew).
constexpr int64_t kFusedWork = int64_t(1) << 30;
constexpr int64_t kFusedRows = 64;

constexpr int kRowsOfBlock = 8;  // of Gram matrices, one a warp

struct Shape {
  int64_t groups, n, width;  // filters of a group, entries of a filter with its bias
  bool columns;

  int64_t m() const { return columns ? width : n; }
  int64_t inner() const { return columns ? n : width; }
};

constexpr int64_t divide_up(int64_t size, int64_t by) { return (size + by - 1) / by; }

// The rows of S are whole 16 bytes of float.
constexpr int64_t padded(int64_t row) { return divide_up(row, 4) * 4; }

// The blocks' work on one layer of a launch: `units` units from first_unit on. Of a Gram matrix,
// tile after tile of the lower triangle of each group, each in `slices` runs of slice_length inner
// entries; of a gradient, tile after tile.
struct Item {
  int layer;
  int64_t units, first_unit;
  int64_t slices = 1, slice_length = 0;
  int64_t first_part = 0;  // Gram: where its tiles' parts of the penalty start, one a tile
  int64_t first_slab = 0;  // Gram with slices > 1: where its units' sums start
};

struct Launch {
  int tile;                 // 0 where there is none
  std::vector<Item> items;  // the dearest units first
  int64_t units = 0;
};

struct Plan {
  bool fused = false;  // `gradient` does everything, its units being a layer's shares
  std::vector<Launch> gram, gradient;
  std::vector<Launch> sliced;   // of each of `gram`: a unit is a tile whose slices are added
  std::vector<Launch> cosines;  // a unit is kRowsOfBlock rows; see plan_cosines
  int64_t parts = 0;  // of the penalty, and those of layer l are [first_part[l], first_part[l + 1])
  std::vector<int64_t> first_part;
  int64_t slab_entries = 0;  // of the workspace for the sums of split tiles
};

// The sums of one slice of a tile: the tile, and up to 64 (or a row's) exact sums in double.
constexpr int64_t slab_entries(int64_t tile) { return tile * tile + 2 * (tile > 64 ? tile : 64); }

inline int64_t lower_tiles(const Shape& s, int64_t tile) {
  const int64_t across = divide_up(s.m(), tile);
  return s.groups * across * (across + 1) / 2;
}
inline int64_t gradient_tiles(const Shape& s, int64_t tile) {
  return s.groups * divide_up(s.n, tile) * divide_up(s.width, tile);
}

namespace plan {

// Appends the layers of one tile size as launches, dearest unit first.
template <class MakeItem, class Cost>
void add_launches(std::vector<Launch>& out, int tile, std::vector<int> layers,
                  const MakeItem& make_item, const Cost& cost) {
  constexpr int64_t kMostUnits = 1 << 30;  // and as many blocks can be added to it
  std::stable_sort(layers.begin(), layers.end(), [&](int a, int b) { return cost(a) > cost(b); });
  const size_t first = out.size(), count = layers.size();
  const size_t most =  // of one launch, all of them having as many
      count == 0 ? 1 : divide_up(count, divide_up(count, kLayersPerLaunch));
  for (const int layer : layers) {
    Item item = make_item(layer);
    if (item.units > kMostUnits) throw std::length_error("a layer needs more than 2^30 tiles");
    if (item.units == 0) continue;
    if (out.size() == first || out.back().items.size() == most ||
        out.back().units + item.units > kMostUnits) {
      out.push_back({tile, {}, 0});
    }
    item.first_unit = out.back().units;
    out.back().units += item.units;
    out.back().items.push_back(item);
  }
}

// The launches that add up the slices, one for each of `gram`, without units where none is sliced.
inline void add_sliced(Plan& out) {
  for (const Launch& launch : out.gram) {
    Launch& sliced = out.sliced.emplace_back(Launch{launch.tile, {}, 0});
    for (Item item : launch.items) {
      if (item.slices == 1) continue;
      item.units /= item.slices;
      item.first_unit = sliced.units;
      sliced.units += item.units;
      sliced.items.push_back(item);
    }
  }
}

// The layers by tile size: 128, 64, 32.
struct ByTile {
  std::vector<int> layers[3];
  static constexpr int kTiles[3] = {128, 64, 32};
};

// tile: of all layers, or 0: each by its smaller side. 128 from `large` on where that leaves enough
// work for each block, 32 where it saves more than a launch costs.
template <class Side, class Tiles, class Inner>
ByTile sort_by_tile(const std::vector<Shape>& shapes, int tile, int64_t large, const Side& side,
                    const Tiles& tiles, const Inner& inner) {
  int64_t work = 0, small_units = 0;
  for (const Shape& s : shapes) {
    if (side(s) >= large) work += tiles(s, 128) * inner(s);
    if (side(s) <= 32) small_units += tiles(s, 64);
  }
  ByTile out;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const int64_t mine = side(shapes[i]);
    const int wanted = tile != 0                                    ? tile
                       : mine <= 32 && small_units > kFewUnits      ? 32
                       : mine >= large && work >= kWorkOfLargeTiles ? 128
                                                                    : 64;
    out.layers[wanted == 128 ? 0 : wanted == 64 ? 1 : 2].push_back(static_cast<int>(i));
  }
  return out;
}

}  // namespace plan

// tile_of_all: 32, 64 or 128 for all layers, 0 for the best one of each.
inline void plan_gram(const std::vector<Shape>& shapes, int tile_of_all, Plan& out) {
  const plan::ByTile sorted = plan::sort_by_tile(
      shapes, tile_of_all, /*large=*/257, [](const Shape& s) { return s.m(); }, lower_tiles,
      [](const Shape& s) { return s.inner(); });
  std::vector<int64_t> parts(shapes.size());
  for (int which = 0; which < 3; ++which) {
    const int tile = plan::ByTile::kTiles[which];
    const int64_t enough = tile == 128 ? kEnoughLargeUnits : kEnoughUnits;
    int64_t tiles = 0, total = 0;
    for (const int i : sorted.layers[which]) {
      parts[i] = lower_tiles(shapes[i], tile);
      tiles += parts[i];
      total += parts[i] * shapes[i].inner();
    }
    // a slice has about this many inner entries; with tiles enough, only what would last far longer
    // than all others is cut
    const int64_t slice = std::max(total / enough * (tiles < enough ? 1 : 4), kShortestSlice);
    const size_t first = out.gram.size();
    plan::add_launches(
        out.gram, tile, sorted.layers[which],
        [&](int i) {
          const int64_t inner = shapes[i].inner();
          Item item{i, 0, 0};
          const int64_t wanted = std::max<int64_t>((inner + slice / 2) / slice, 1);
          item.slice_length = divide_up(divide_up(inner, wanted), kDepth) * kDepth;
          item.slices = inner == 0 ? 1 : divide_up(inner, item.slice_length);
          item.units = parts[i] * item.slices;
          return item;
        },
        [&](int i) { return std::min(shapes[i].inner(), slice * 3 / 2); });
    for (size_t l = first; l < out.gram.size(); ++l) {
      int64_t slabs = 0;
      for (Item& item : out.gram[l].items) {
        if (item.slices == 1) continue;
        item.first_slab = slabs;
        slabs += item.units;
      }
      out.slab_entries = std::max(out.slab_entries, slabs * slab_entries(tile));
    }
  }
  out.first_part.assign(1, 0);
  for (const int64_t count : parts) out.first_part.push_back(out.first_part.back() + count);
  out.parts = out.first_part.back();
  for (Launch& launch : out.gram) {
    for (Item& item : launch.items) item.first_part = out.first_part[item.layer];
  }
  plan::add_sliced(out);
}

// After plan_gram, for penalties on cosines: a pass over the rows of all Gram matrices, and each
// row is a part of the penalty.
inline void plan_cosines(const std::vector<Shape>& shapes, Plan& out) {
  const auto rows = [&](int i) { return shapes[i].groups * shapes[i].m(); };
  std::vector<int> layers;
  out.first_part.assign(1, 0);
  for (int i = 0; i < static_cast<int>(shapes.size()); ++i) {
    layers.push_back(i);
    out.first_part.push_back(out.first_part.back() + rows(i));
  }
  out.parts = out.first_part.back();
  plan::add_launches(
      out.cosines, 0, layers, [&](int i) { return Item{i, divide_up(rows(i), kRowsOfBlock), 0}; },
      [&](int i) { return shapes[i].m(); });
  for (auto* launches : {&out.gram, &out.sliced, &out.cosines}) {
    for (Launch& launch : *launches) {
      for (Item& item : launch.items) item.first_part = out.first_part[item.layer];
    }
  }
}

inline void plan_gradient(const std::vector<Shape>& shapes, int tile_of_all, Plan& out) {
  const plan::ByTile sorted = plan::sort_by_tile(
      shapes, tile_of_all, /*large=*/128, [](const Shape& s) { return std::min(s.n, s.width); },
      gradient_tiles, [](const Shape& s) { return s.m(); });
  for (int which = 0; which < 3; ++which) {
    const int tile = plan::ByTile::kTiles[which];
    plan::add_launches(
        out.gradient, tile, sorted.layers[which],
        [&](int i) { return Item{i, gradient_tiles(shapes[i], tile), 0}; },
        [&](int i) { return shapes[i].m(); });
  }
}

// Where all layers are small: one launch in which each block forms a whole Gram matrix and then its
// share of the layer's gradient. False where that does not pay.
inline bool plan_fused(const std::vector<Shape>& shapes, int tile_of_all, Plan& out) {
  int64_t rows = 0, work = 0;
  for (const Shape& s : shapes) {
    if (s.groups != 1) return false;
    rows = std::max(rows, s.m());
  }
  const int tile = tile_of_all != 0 ? tile_of_all : rows > 32 ? 64 : 32;
  if (rows > kFusedRows || rows > tile || tile > 64) return false;
  const int64_t each = std::max<int64_t>(kEnoughUnits / std::max<int64_t>(shapes.size(), 1), 1);
  const auto shares = [&](int i) {
    return std::clamp<int64_t>(gradient_tiles(shapes[i], tile), 1, each);
  };
  std::vector<int> layers;
  for (int i = 0; i < static_cast<int>(shapes.size()); ++i) {
    layers.push_back(i);
    work += shares(i) * tile * tile * shapes[i].inner();
  }
  if (work > kFusedWork) return false;
  plan::add_launches(
      out.gradient, tile, layers,
      [&](int i) { return Item{i, shares(i), 0, 1, shapes[i].inner()}; },
      [&](int i) {
        return shapes[i].inner() + gradient_tiles(shapes[i], tile) * tile / shares(i);
      });
  out.first_part.assign(1, 0);
  for (size_t i = 0; i < shapes.size(); ++i) {
    out.first_part.push_back(out.first_part.back() + 1);
  }
  return out.fused = true;
}

// Runs of layers whose Gram matrices, of so many bytes each, fit into `most` bytes together (one
// layer alone may exceed it), as first layers and the number of layers at the end.
inline std::vector<int> waves(const std::vector<int64_t>& bytes, int64_t most) {
  std::vector<int> out{0};
  int64_t sum = 0;
  for (int i = 0; i < static_cast<int>(bytes.size()); ++i) {
    if (sum > 0 && sum + bytes[i] > most) {
      out.push_back(i);
      sum = 0;
    }
    sum += bytes[i];
  }
  out.push_back(static_cast<int>(bytes.size()));
  return out;
}

}  // namespace orthoreg
