// gram, and the Gram matrices of the penalties: a launch for each tile size, two where tiles are
// sliced, one for cosines, and one that adds up the penalties.
#include "gram.cuh"
#include "gram.h"
#include "visit_tile.cuh"

namespace orthoreg::cuda {
namespace {

template <class Tile>
void form_tiles(const std::vector<Layer>& layers, const Wave& wave, const Launch& launch,
                int penalty, Tables& tables, const Tensor& out, double* parts, const Tensor& slabs,
                cudaStream_t stream) {
  using Number = typename Tile::Number;
  const Problems& problems = tables.next(layers, wave, launch, {}, penalty);
  launch_persistent(gram_kernel<Tile>, launch.units, Tile::kThreads, kGramSharedBytes<Tile>, stream,
                    problems, data<Number>(out), parts, data<Number>(slabs));
}

template <class Tile>
void finish_tiles(const std::vector<Layer>& layers, const Wave& wave, const Launch& sliced,
                  int penalty, Tables& tables, const Tensor& out, double* parts,
                  const Tensor& slabs, cudaStream_t stream) {
  using Number = typename Tile::Number;
  if (sliced.units == 0) return;
  const Problems& problems = tables.next(layers, wave, sliced, {}, penalty);
  launch_all(finish_tiles_kernel<Tile>, sliced.units, Tile::kThreads, kTileBytes<Tile>, stream,
             problems, data<Number>(out), parts, data<Number>(slabs));
}

template <class T>
void take_cosines(const std::vector<Layer>& layers, const Wave& wave, int penalty, Tables& tables,
                  const Tensor& out, double* rows, cudaStream_t stream) {
  for (const Launch& one : wave.plan.cosines) {
    const Problems& problems = tables.next(layers, wave, one, {}, penalty);
    launch_all(cosine_kernel<T>, one.units, 32 * kRowsOfBlock, 0, stream, problems, data<T>(out),
               rows, wave.plan.parts);
  }
}

template <class T>
void add_parts(const std::vector<Layer>& layers, const Wave& wave, const double* parts, bool root,
               T* values, cudaStream_t stream) {
  auto totals = std::make_unique<Totals>();
  for (int first = 0; first < wave.count(); first += Totals::kMost) {
    const int last = std::min(first + Totals::kMost, wave.count());
    for (int i = first; i < last; ++i) {
      totals->layer[i - first] = {layers[wave.first + i].offset,
                                  static_cast<int32_t>(wave.plan.first_part[i]),
                                  static_cast<int32_t>(wave.plan.first_part[i + 1])};
    }
    launch_all(finish_penalty_kernel<T>, last - first, 128, 0, stream, *totals, parts, root,
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
  Tables tables;
  form_grams(layers, wave, product, /*penalty=*/-1, tables, out, nullptr,
             current_stream(weights[0]));
  return out;
}

}  // namespace

void form_grams(const std::vector<Layer>& layers, const Wave& wave, Product product, int penalty,
                Tables& tables, const Tensor& out, void* values, cudaStream_t stream) {
  const bool in_double = out.scalar_type() == ScalarType::Double;
  const bool cosines = Penalties::takes_cosines(penalty);
  const Tensor parts = torch::stable::new_empty(
      out, {penalty < 0 ? 0 : (cosines ? 2 : 1) * wave.plan.parts}, ScalarType::Double);
  const Tensor slabs = torch::stable::new_empty(out, {wave.plan.slab_entries});
  double* mine = data<double>(parts);
  for (size_t i = 0; i < wave.plan.gram.size(); ++i) {
    const Launch &one = wave.plan.gram[i], &sliced = wave.plan.sliced[i];
    const auto form = [&](auto tile) {
      form_tiles<decltype(tile)>(layers, wave, one, penalty, tables, out, mine, slabs, stream);
    };
    const auto finish = [&](auto tile) {
      finish_tiles<decltype(tile)>(layers, wave, sliced, penalty, tables, out, mine, slabs, stream);
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
    if (cosines) {
      take_cosines<T>(layers, wave, penalty, tables, out, mine, stream);
      mine += wave.plan.parts;
    }
    add_parts(layers, wave, mine, Penalties::takes_root(penalty), static_cast<T*>(values), stream);
  };
  in_double ? finish(double{}) : finish(float{});
}

}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, ORTHOREG_CUDA_KEY, m) {
  m.impl("gram", TORCH_BOX(&orthoreg::cuda::gram));
}
