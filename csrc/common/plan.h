// The launch plan of the tiled kernels: which block computes which tile. Host data, no tensors,
// from shapes alone, so it is the same on every machine. _host.build_plan shows it to Python.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace orthoreg {

constexpr int kTile = 64;  // output entries of a block in each dimension

// One launch carries the descriptions of its layers in its parameters: 32 764 bytes from CUDA 12.1
// on (sm_70 and newer), 4 096 before.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kLayersPerLaunch = 36;
#else
constexpr int kLayersPerLaunch = 320;
#endif

struct Shape {
  int64_t groups, n, width;  // filters of a group, entries of a filter with its bias
  bool columns;

  int64_t m() const { return columns ? width : n; }
};

inline int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

// Lower-triangular tiles of the layer's Gram matrices.
inline int64_t gram_units(const Shape& s) {
  const int64_t t = tiles(s.m());
  return s.groups * t * (t + 1) / 2;
}

// Tiles of the layer's gradient.
inline int64_t grad_units(const Shape& s) { return s.groups * tiles(s.n) * tiles(s.width); }

// One launch: layers [first, last) and where each layer's blocks start.
struct Launch {
  int first, last;
  std::vector<int64_t> first_unit;  // one more than layers; the last entry is the number of blocks
};

template <class Units>
std::vector<Launch> plan_launches(const std::vector<Shape>& shapes, const Units& units) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  std::vector<Launch> launches;
  for (int i = 0; i < static_cast<int>(shapes.size()); ++i) {
    const int64_t blocks = units(shapes[i]);
    if (blocks > kMaxBlocks) throw std::length_error("a layer needs more than 2^31 tiles");
    if (launches.empty() || i - launches.back().first == kLayersPerLaunch ||
        launches.back().first_unit.back() + blocks > kMaxBlocks) {
      launches.push_back({i, i, {0}});
    }
    launches.back().last = i + 1;
    launches.back().first_unit.push_back(launches.back().first_unit.back() + blocks);
  }
  return launches;
}

}  // namespace orthoreg
