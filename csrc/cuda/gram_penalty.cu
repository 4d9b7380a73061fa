// gram_penalty, gram_penalty_grad and add_gram_penalty_grad_ for all layers.
#include <tuple>

#include "../common/prepared.h"
#include "../common/workspace.h"
#include "gram.h"
#include "gram_penalty.cuh"
#include "visit_tile.cuh"

namespace orthoreg::cuda {
namespace {

template <class Tile>
void launch_gradient(Table& table, const void* slopes, const void* coefficients, const void* roots,
                     bool accumulate, cudaStream_t stream) {
  using Number = typename Tile::Number;
  launch_persistent(gram_penalty_grad_kernel<Tile>, table, Tile::kThreads, kGradSharedBytes<Tile>,
                    stream, static_cast<const Number*>(slopes),
                    static_cast<const Number*>(coefficients), static_cast<const Number*>(roots),
                    accumulate);
}

// coefficients: those of the wave's layers, on the device; roots: their values, or null.
void gradients(const std::vector<Layer>& layers, const Wave& wave,
               const std::vector<Gradient>& grads, bool in_double, Product product, Tables& tables,
               const void* slopes, const void* coefficients, const void* roots, bool accumulate,
               cudaStream_t stream) {
  for (const Launch& one : wave.plan.gradient) {
    Table& table = tables.next(layers, wave, one, grads, -1);
    if (in_double) {
      launch_gradient<SimtTile<double>>(table, slopes, coefficients, roots, accumulate, stream);
    } else {
      visit_tile(one.tile, product, [&](auto tile) {
        launch_gradient<decltype(tile)>(table, slopes, coefficients, roots, accumulate, stream);
      });
    }
  }
}

template <class Tile>
void launch_fused(Table& table, void* slopes, const void* coefficients, void* values,
                  cudaStream_t stream) {
  using Number = typename Tile::Number;
  launch_all(fused_gram_penalty_kernel<Tile>, table, Tile::kThreads, kFusedSharedBytes<Tile>,
             stream, static_cast<Number*>(slopes), static_cast<const Number*>(coefficients),
             static_cast<Number*>(values));
}

// Launches cost more than products here, so there is one kernel for every precision of float32.
void fused(const std::vector<Layer>& layers, const Wave& wave, const std::vector<Gradient>& grads,
           bool in_double, Product product, int penalty, Tables& tables, void* slopes,
           const void* coefficients, void* values, cudaStream_t stream) {
  for (const Launch& one : wave.plan.gradient) {
    Table& table = tables.next(layers, wave, one, grads, penalty);
    if (in_double) {
      launch_fused<SimtTile<double>>(table, slopes, coefficients, values, stream);
    } else if (product == Product::kSimt) {
      launch_fused<SimtTile<float>>(table, slopes, coefficients, values, stream);
    } else if (one.tile == 32) {
      launch_fused<TensorTile<32, Product::kTf32x3>>(table, slopes, coefficients, values, stream);
    } else {
      launch_fused<TensorTile<64, Product::kTf32x3>>(table, slopes, coefficients, values, stream);
    }
  }
}

// Value and gradient of a list of layers, planned once for all calls.
struct AddPlan {
  std::vector<Wave> waves;
  Precision precision;
  int penalty;
  bool in_double;
  Workspace::Sizes sizes;
};

AddPlan plan_add(const std::vector<Layer>& layers, bool in_double, const std::string& penalty,
                 const std::string& precision) {
  AddPlan out{{}, read_precision(precision), Penalties::id(penalty), in_double, {}};
  out.precision.gram = in_double ? Product::kSimt : usable(out.precision.gram);
  out.precision.gradient = in_double ? Product::kSimt : usable(out.precision.gradient);
  const std::vector<Shape> all = shapes(layers);
  std::vector<int64_t> bytes;
  for (const Shape& s : all) {
    bytes.push_back(s.groups * s.m() * padded(s.m()) * (in_double ? 8 : 4));
  }
  const std::vector<int> starts = waves(bytes, workspace_bytes());
  for (size_t w = 0; w + 1 < starts.size(); ++w) {
    Wave wave{starts[w], starts[w + 1], {}, {}, {}};
    const std::vector<Shape> mine(all.begin() + wave.first, all.begin() + wave.last);
    const int tile = tile_of_all(out.precision.gram);
    if (!plan_fused(mine, tile, wave.plan)) {
      plan_gram(mine, tile, wave.plan);
      if (Penalties::takes_cosines(out.penalty)) plan_cosines(mine, wave.plan);
      plan_gradient(mine, tile_of_all(out.precision.gradient), wave.plan);
    }
    for (const Shape& s : mine) {
      const int64_t stride = padded(s.m());
      wave.slopes.push_back(wave.slopes_size);
      wave.slope_stride.push_back(static_cast<int32_t>(stride));
      wave.slopes_size += s.groups * s.m() * stride;
    }
    if (wave.plan.fused) {  // one for each block
      wave.slopes_size = 0;
      for (const Launch& one : wave.plan.gradient) {
        for (const Item& item : one.items) {
          wave.slopes[item.layer] = wave.slopes_size;
          wave.slopes_size += item.units * mine[item.layer].m() * wave.slope_stride[item.layer];
        }
      }
    }
    out.sizes.fit(wave, out.penalty);
    out.waves.push_back(std::move(wave));
  }
  return out;
}

// Adds the gradients to `grads`; returns the values [L].
Tensor run_add(const std::vector<Layer>& layers, const AddPlan& plan, Tables& tables,
               const std::vector<Gradient>& grads, const Tensor& coefficients,
               cudaStream_t stream) {
  tables.rewind();
  const Tensor values =
      torch::stable::new_empty(coefficients, {static_cast<int64_t>(layers.size())});
  const Workspace workspace(coefficients, plan.sizes);
  const int64_t element = plan.in_double ? 8 : 4;
  const auto entry = [&](const Tensor& of_layers, int i) {
    return data<char>(of_layers) + i * element;
  };
  for (const Wave& wave : plan.waves) {
    void* mine = entry(values, wave.first);
    const void* factors = entry(coefficients, wave.first);
    if (wave.plan.fused) {
      fused(layers, wave, grads, plan.in_double, plan.precision.gram, plan.penalty, tables,
            workspace.slopes, factors, mine, stream);
    } else {
      form_grams(layers, wave, plan.in_double, plan.precision.gram, plan.penalty, tables, workspace,
                 workspace.slopes, mine, stream);
      gradients(layers, wave, grads, plan.in_double, plan.precision.gradient, tables,
                workspace.slopes, factors, Penalties::takes_root(plan.penalty) ? mine : nullptr,
                /*accumulate=*/true, stream);
    }
  }
  return values;
}

std::tuple<Tensor, Tensor> gram_penalty(std::vector<Tensor> weights, std::vector<Tensor> biases,
                                        std::vector<Tensor> pruned, std::vector<Tensor> targets,
                                        std::vector<int64_t> groups, std::vector<int64_t> columns,
                                        std::vector<double> offsets, std::string penalty,
                                        std::string precision) {
  const std::vector<Layer> layers =
      read_layers(weights, biases, groups, columns, {penalty, offsets, pruned, targets});
  const Product wanted = read_precision(precision).gram;
  const int id = Penalties::id(penalty);
  const DeviceScope scope(weights[0]);
  const Product product = is_double(weights) ? Product::kSimt : usable(wanted);
  const ScalarType type = compute_type(weights);
  const int64_t count = static_cast<int64_t>(layers.size());
  Tensor values = torch::stable::new_empty(weights[0], {count}, type);
  Tensor slopes = torch::stable::new_empty(weights[0], {slopes_size(layers)}, type);
  Wave wave = whole_wave(layers);
  plan_gram(shapes(layers), tile_of_all(product), wave.plan);
  if (Penalties::takes_cosines(id)) plan_cosines(shapes(layers), wave.plan);
  wave.slopes_size = 0;  // they go to `slopes`
  Workspace::Sizes sizes;
  sizes.fit(wave, id);
  Tables tables;
  form_grams(layers, wave, is_double(weights), product, id, tables, Workspace(values, sizes),
             data<void>(slopes), data<void>(values), current_stream(weights[0]));
  return {values, slopes};
}

std::vector<Tensor> gram_penalty_grad(std::vector<Tensor> weights, std::vector<Tensor> biases,
                                      std::vector<Tensor> pruned, std::vector<Tensor> targets,
                                      Tensor slopes, Tensor coefficients,
                                      std::vector<int64_t> groups, std::vector<int64_t> columns,
                                      std::string penalty, std::string precision) {
  const std::vector<Layer> layers =
      read_layers(weights, biases, groups, columns, {penalty, {}, pruned, targets});
  check_coefficients(coefficients, weights);
  check_slopes(slopes, weights, layers);
  const Product wanted = read_precision(precision).gradient;
  const DeviceScope scope(weights[0]);
  const Product product = is_double(weights) ? Product::kSimt : usable(wanted);
  std::vector<Tensor> grads, bias_grads;
  for (const Tensor& w : weights) grads.push_back(torch::stable::empty_like(w));
  for (const Tensor& b : biases) bias_grads.push_back(torch::stable::empty_like(b));
  Wave wave = whole_wave(layers);
  plan_gradient(shapes(layers), tile_of_all(product), wave.plan);
  Tables tables;
  gradients(layers, wave, read_gradients(weights, biases, grads, bias_grads), is_double(weights),
            product, tables, data<void>(slopes), data<void>(coefficients), /*roots=*/nullptr,
            /*accumulate=*/false, current_stream(weights[0]));
  grads.insert(grads.end(), bias_grads.begin(), bias_grads.end());
  return grads;
}

Tensor add_gram_penalty_grad_(std::vector<Tensor> weights, std::vector<Tensor> biases,
                              std::vector<Tensor> pruned, std::vector<Tensor> targets,
                              std::vector<Tensor> grads, std::vector<Tensor> bias_grads,
                              Tensor coefficients, std::vector<int64_t> groups,
                              std::vector<int64_t> columns, std::vector<double> offsets,
                              std::string penalty, std::string precision) {
  const std::vector<Layer> layers =
      read_layers(weights, biases, groups, columns, {penalty, offsets, pruned, targets});
  check_coefficients(coefficients, weights);
  const std::vector<Gradient> into = read_gradients(weights, biases, grads, bias_grads);
  const DeviceScope scope(weights[0]);
  Tables tables;
  return run_add(layers, plan_add(layers, is_double(weights), penalty, precision), tables, into,
                 coefficients, current_stream(weights[0]));
}

class PreparedOnCuda : public Prepared {
 public:
  explicit PreparedOnCuda(Arguments given)
      : Prepared(std::move(given)),
        plan_(plan_add(layers(), is_double(arguments().weights), arguments().of.penalty,
                       arguments().precision)) {}

 protected:
  Tensor add_to(const std::vector<Gradient>& gradients, const Tensor& coefficients) override {
    const DeviceScope scope(coefficients);
    return run_add(layers(), plan_, tables_, gradients, coefficients, current_stream(coefficients));
  }

 private:
  const AddPlan plan_;
  Tables tables_;
};

int64_t prepare_gram_penalty(std::vector<Tensor> weights, std::vector<Tensor> biases,
                             std::vector<Tensor> pruned, std::vector<Tensor> targets,
                             std::vector<int64_t> groups, std::vector<int64_t> columns,
                             std::vector<double> offsets, std::string penalty,
                             std::string precision) {
  STD_TORCH_CHECK(!weights.empty(), "an operator needs at least one weight");
  const DeviceScope scope(weights[0]);
  return keep_prepared(std::make_unique<PreparedOnCuda>(Prepared::Arguments{
      weights, biases, groups, columns, {penalty, offsets, pruned, targets}, precision}));
}

}  // namespace
}  // namespace orthoreg::cuda

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, ORTHOREG_CUDA_KEY, m) {
  m.impl("gram_penalty", TORCH_BOX(&orthoreg::cuda::gram_penalty));
  m.impl("gram_penalty_grad", TORCH_BOX(&orthoreg::cuda::gram_penalty_grad));
  m.impl("add_gram_penalty_grad_", TORCH_BOX(&orthoreg::cuda::add_gram_penalty_grad_));
  m.impl("prepare_gram_penalty", TORCH_BOX(&orthoreg::cuda::prepare_gram_penalty));
}
