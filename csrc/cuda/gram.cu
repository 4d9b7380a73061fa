// gram, and the Gram matrices of the penalties: a launch for each tile size, two where tiles are
// sliced, one for cosines, and one that adds up the penalties.
#include "gram.cuh"
#include "gram.h"
#include "visit_tile.cuh"

namespace orthoreg::cuda {
namespace {

template <class Tile>
void form_tiles(Table& table, const Workspace& workspace, void* out, cudaStream_t stream) {
  using Number = typename Tile::Number;
  launch_persistent(gram_kernel<Tile>, table, Tile::kThreads, kGramSharedBytes<Tile>, stream,
                    static_cast<Number*>(out), workspace.parts,
                    static_cast<Number*>(workspace.slabs));
}

template <class Tile>
void finish_tiles(Table& table, const Workspace& workspace, void* out, cudaStream_t stream) {
  using Number = typename Tile::Number;
  launch_all(finish_tiles_kernel<Tile>, table, Tile::kThreads, kTileBytes<Tile>, stream,
             static_cast<Number*>(out), workspace.parts,
             static_cast<const Number*>(workspace.slabs));
}

template <class T>
void add_parts(const std::vector<Layer>& layers, const Wave& wave, const double* parts, bool root,
               T* values, cudaStream_t stream) {
  Totals totals;
  for (int first = 0; first < wave.count(); first += Totals::kMost) {
    const int count = std::min(Totals::kMost, wave.count() - first);
    for (int i = 0; i < count; ++i) {
      totals.layer[i] = {layers[wave.first + first + i].offset,
                         static_cast<int32_t>(wave.plan.first_part[first + i]),
                         static_cast<int32_t>(wave.plan.first_part[first + i + 1])};
    }
    launch_blocks(finish_penalty_kernel<T>, count, count, 128, 0, stream, totals, parts, root,
                  values + first);
  }
}

Tensor gram(std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<int64_t> groups,
            std::vector<int64_t> columns, std::string precision) {
  const std::vector<Layer> layers = read_layers(weights, biases, groups, columns);
  const Product wanted = read_precision(precision).gram;
  const DeviceScope scope(weights[0]);
  const Product product = is_double(weights) ? Product::kSimt : usable(wanted);
  Tensor out = torch::stable::new_empty(weights[0], {slopes_size(layers)}, compute_type(weights));
  Wave wave = whole_wave(layers);
  plan_gram(shapes(layers), tile_of_all(product), wave.plan);
  wave.slopes_size = 0;  // they go to `out`
  Workspace::Sizes sizes;
  sizes.fit(wave, /*penalty=*/-1);
  Tables tables;
  form_grams(layers, wave, is_double(weights), product, /*penalty=*/-1, tables,
             Workspace(out, sizes), data<void>(out), nullptr, current_stream(weights[0]));
  return out;
}

}  // namespace

void form_grams(const std::vector<Layer>& layers, const Wave& wave, bool in_double, Product product,
                int penalty, Tables& tables, const Workspace& workspace, void* out, void* values,
                cudaStream_t stream) {
  for (size_t i = 0; i < wave.plan.gram.size(); ++i) {
    const Launch &one = wave.plan.gram[i], &sliced = wave.plan.sliced[i];
    const auto form = [&](auto tile) {
      form_tiles<decltype(tile)>(tables.next(layers, wave, one, {}, penalty), workspace, out,
                                 stream);
    };
    const auto finish = [&](auto tile) {
      if (sliced.units == 0) return;
      finish_tiles<decltype(tile)>(tables.next(layers, wave, sliced, {}, penalty), workspace, out,
                                   stream);
    };
    if (in_double) {
      form(SimtTile<double>{});
      finish(SimtTile<double>{});
      continue;
    }
    visit_tile(one.tile, product, form);
    // the slices are sums already: which product they come from makes no difference
    if (product == Product::kSimt) {
      finish(SimtTile<float>{});
    } else {
      visit_tensor_tile<Product::kTf32>(one.tile, finish);
    }
  }
  if (values == nullptr) return;
  const auto finish = [&](auto zero) {
    using T = decltype(zero);
    const double* parts = workspace.parts;
    for (const Launch& one : wave.plan.cosines) {
      launch_all(cosine_kernel<T>, tables.next(layers, wave, one, {}, penalty), 32 * kRowsOfBlock,
                 0, stream, static_cast<T*>(out), workspace.parts, wave.plan.parts);
      parts = workspace.parts + wave.plan.parts;
    }
    add_parts(layers, wave, parts, Penalties::takes_root(penalty), static_cast<T*>(values), stream);
  };
  in_double ? finish(double{}) : finish(float{});
}

}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, ORTHOREG_CUDA_KEY, m) {
  m.impl("gram", TORCH_BOX(&orthoreg::cuda::gram));
}
