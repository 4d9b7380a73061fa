// gram_penalty, gram_penalty_grad, add_gram_penalty_grad_ and its prepared form on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <numeric>
#include <tuple>
#include <type_traits>

#include "../common/entrywise.h"
#include "../common/prepared.h"
#include "../common/workspace.h"
#include "gram.h"

namespace orthoreg::cpu {
namespace {

// What the penalty knows of the rows of one Gram matrix, from its row `first` on.
template <class T>
struct Rows {
  const uint8_t *pruned = nullptr, *marked = nullptr;
  const T* targets = nullptr;

  Rows(const Layer& layer, int64_t group, int64_t first) {
    if (layer.columns) return;
    const int64_t row = group * layer.n + first;
    if (layer.pruned != nullptr) pruned = layer.pruned + row;
    if (layer.marked != nullptr) marked = layer.marked + row;
    if (layer.targets != nullptr) targets = static_cast<const T*>(layer.targets) + row;
  }
  double target(int64_t i) const {
    return pruned != nullptr && pruned[i] ? 0 : targets != nullptr ? targets[i] : 1;
  }
  bool is_marked(int64_t i) const { return marked != nullptr && marked[i]; }
};

// Sums phi over those of `count` entries that count(j), and replaces them by phi'. In lanes, which
// compilers make registers of: about one instruction an entry, reading and writing each once.
template <class Penalty, class T, class Counts>
double apply_row(T* row, int64_t count, const Counts& counts) {
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T r = counts(j + lane) ? row[j + lane] : T(0);
      sums[lane] += Penalty::value(r);
      row[j + lane] = Penalty::slope(r);
    }
  }
  double sum = 0;
  for (; j < count; ++j) {
    const T r = counts(j) ? row[j] : T(0);
    sum += Penalty::value(r);
    row[j] = Penalty::slope(r);
  }
  for (const T part : sums) sum += part;
  return sum;
}

// In: a tile of G. Out: the same tile of S = phi'(R). Returns its part of sum phi(R), the entries
// off the diagonal counted twice. `of` are the tile's rows, `across` those that its columns are.
template <class Penalty, class T>
double apply(const GramTile<T>& tile, const Rows<T>& of, const Rows<T>& across) {
  double once = 0, twice = 0;
  for (int64_t i = 0; i < tile.rows.count; ++i) {
    T* row = tile.g + i * kTileStride;
    const auto counts = [&](int64_t j) {
      return !Penalty::kMarked || Penalty::counts(of.is_marked(i), across.is_marked(j));
    };
    twice += apply_row<Penalty>(row, tile.diagonal == nullptr ? tile.columns.count : i, counts);
    if (tile.diagonal == nullptr) continue;
    constexpr Diagonal kind = Penalty::kDiagonal;
    const double target = kind == Diagonal::kTarget ? of.target(i) : 0;
    const T r =
        kind != Diagonal::kFree && counts(i) ? static_cast<T>(tile.diagonal[i] - target) : T(0);
    once += Penalty::value(r);
    row[i] = Penalty::slope(r);
  }
  return once + 2 * twice;
}

// In: G, and its diagonal in `square`, which becomes the inverse norms. Out: S, with
// S_ij = phi'(C_ij) / sqrt(G_ii G_jj) off the diagonal of the cosines C and
// S_ii = -sum_j phi'(C_ij) C_ij / G_ii on it. Returns sum phi(C) off the diagonal. Rows of zeros
// have the cosine 0 with every other one.
template <class Penalty, class T>
double apply_to_cosines(const Symmetric<T>& g, double* square) {
  double* const inverse = square;
  for (int64_t i = 0; i < g.m; ++i) {
    inverse[i] = square[i] < kSmallestSquare<T> ? 0 : 1 / std::sqrt(square[i]);
  }
  double value = 0;
  for (int64_t i = 0; i < g.m; ++i) {
    T* row = &g.at(i, 0);
    double turn = 0;
    for (int64_t j = 0; j < g.m; ++j) {
      if (j == i) continue;
      T& entry = row[j * g.lanes];
      const double scale = inverse[i] * inverse[j], cosine = entry * scale;
      const double slope = Penalty::slope(cosine);
      value += Penalty::value(cosine);
      turn += slope * cosine;
      entry = static_cast<T>(slope * scale);
    }
    row[i * g.lanes] = static_cast<T>(-turn * inverse[i] * inverse[i]);
  }
  return value;
}

// Turns G into S tile by tile, and keeps each unit's part of the penalty.
template <class Penalty, class T>
class EntrywiseEpilogue {
 public:
  EntrywiseEpilogue(const std::vector<Layer>& layers, const GramPlan& plan)
      : layers_(layers),
        plan_(plan),
        parts_(plan.units.size()),
        roots_(Penalty::kRoot ? layers.size() : 0) {}

  void tile(size_t unit, int l, int64_t group, const GramTile<T>& tile) {
    const Layer& layer = layers_[l];
    parts_[unit] += apply<Penalty>(tile, Rows<T>(layer, group, tile.rows.start),
                                   Rows<T>(layer, group, tile.columns.start));
  }
  void matrix(int, int64_t, Symmetric<T>) {}
  void layer(int l) {
    if (Penalty::kRoot) roots_[l] = value(l);
  }
  T factor(int l, T coefficient) const {
    return gradient_factor<T>(coefficient, Penalty::kRoot ? &roots_[l] : nullptr);
  }

  // Adds up the parts in the order of the units, whoever they are from.
  T value(int l) const {
    double sum = layers_[l].offset;
    for (size_t u = plan_.first_unit[l]; u < parts_.size(); ++u) {
      const Unit& unit = plan_.units[u];
      if (unit.layer != l || unit.kind == UnitKind::kGradientTile) break;
      sum += parts_[u];
    }
    return static_cast<T>(Penalty::kRoot ? std::sqrt(sum) : sum);
  }

 private:
  const std::vector<Layer>& layers_;
  const GramPlan& plan_;
  std::vector<double> parts_;
  std::vector<T> roots_;
};

// Keeps the diagonals, and turns each whole G into S.
template <class Penalty, class T>
class CosineEpilogue {
 public:
  CosineEpilogue(const std::vector<Layer>& layers, const GramPlan& plan) : layers_(layers) {
    for (int l = 0; l < static_cast<int>(layers.size()); ++l) {
      const bool there = plan.first <= l && l < plan.last;
      squares_.emplace_back(there ? layers[l].groups * layers[l].m() : 0);
      parts_.emplace_back(there ? layers[l].groups : 0);
    }
  }

  void tile(size_t, int l, int64_t group, const GramTile<T>& tile) {
    if (tile.diagonal == nullptr) return;
    std::copy_n(tile.diagonal, tile.rows.count,
                squares_[l].data() + group * layers_[l].m() + tile.rows.start);
  }
  void matrix(int l, int64_t group, Symmetric<T> g) {
    parts_[l][group] = apply_to_cosines<Penalty>(g, squares_[l].data() + group * g.m);
  }

  void layer(int) {}
  T factor(int, T coefficient) const { return gradient_factor<T>(coefficient, nullptr); }

  T value(int l) const {
    return static_cast<T>(std::accumulate(parts_[l].begin(), parts_[l].end(), layers_[l].offset));
  }

 private:
  const std::vector<Layer>& layers_;
  std::vector<std::vector<double>> squares_, parts_;  // of each layer's groups
};

// Values, and slopes or gradients, of the layers of one plan.
template <class T>
void run_penalty(const std::vector<Layer>& layers, const GramPlan& plan, const std::string& penalty,
                 T* values, T* slopes, const GradientCall<T>& call) {
  visit_penalty(penalty, [&](auto functor) {
    using Penalty = decltype(functor);
    std::conditional_t<Penalty::kCosines, CosineEpilogue<Penalty, T>, EntrywiseEpilogue<Penalty, T>>
        epilogue(layers, plan);
    run_plan<T>(layers, plan, slopes, call, epilogue);
    for (int l = plan.first; l < plan.last; ++l) values[l] = epilogue.value(l);
  });
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> gram_penalty(std::vector<Tensor> weights, std::vector<Tensor> biases,
                                        std::vector<Tensor> pruned, std::vector<Tensor> targets,
                                        std::vector<int64_t> groups, std::vector<int64_t> columns,
                                        std::vector<double> offsets, std::string penalty,
                                        std::string precision) {
  read_precision(precision);
  const std::vector<Layer> layers =
      read_layers(weights, biases, groups, columns, {penalty, offsets, pruned, targets});
  const ScalarType type = compute_type(weights);
  const int64_t count = static_cast<int64_t>(layers.size());
  Tensor values = torch::stable::new_empty(weights[0], {count}, type);
  Tensor slopes = torch::stable::new_empty(weights[0], {slopes_size(layers)}, type);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    run_penalty<T>(layers, plan_all(layers, {/*gram=*/true, /*gradient=*/false}), penalty,
                   data<T>(values), data<T>(slopes), {});
  };
  is_double(weights) ? run(double{}) : run(float{});
  return {values, slopes};
}

std::vector<Tensor> gram_penalty_grad(std::vector<Tensor> weights, std::vector<Tensor> biases,
                                      std::vector<Tensor> pruned, std::vector<Tensor> targets,
                                      Tensor slopes, Tensor coefficients,
                                      std::vector<int64_t> groups, std::vector<int64_t> columns,
                                      std::string penalty, std::string precision) {
  read_precision(precision);
  const std::vector<Layer> layers =
      read_layers(weights, biases, groups, columns, {penalty, {}, pruned, targets});
  check_coefficients(coefficients, weights);
  check_slopes(slopes, weights, layers);
  std::vector<Tensor> grads, bias_grads;
  for (const Tensor& w : weights) grads.push_back(torch::stable::empty_like(w));
  for (const Tensor& b : biases) bias_grads.push_back(torch::stable::empty_like(b));
  const std::vector<Gradient> into = read_gradients(weights, biases, grads, bias_grads);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    AsItIs<T> epilogue;
    run_plan<T>(layers, plan_all(layers, {/*gram=*/false, /*gradient=*/true}), data<T>(slopes),
                {&into, data<T>(coefficients), /*accumulate=*/false}, epilogue);
  };
  is_double(weights) ? run(double{}) : run(float{});
  grads.insert(grads.end(), bias_grads.begin(), bias_grads.end());
  return grads;
}

std::vector<GramPlan> plan_add(const std::vector<Layer>& layers, bool in_double,
                               const std::string& penalty) {
  const bool root = Penalties::takes_root(Penalties::id(penalty));
  return plan_waves(layers, root, in_double ? 8 : 4, workspace_bytes());
}

// slopes: for the wave that needs the most of them.
Tensor add_penalty(const std::vector<Layer>& layers, const std::vector<GramPlan>& waves,
                   const std::string& penalty, const std::vector<Gradient>& into,
                   const Tensor& coefficients, const Tensor& slopes) {
  const int64_t count = static_cast<int64_t>(layers.size());
  Tensor values = torch::stable::new_empty(coefficients, {count});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    for (const GramPlan& wave : waves) {
      run_penalty<T>(layers, wave, penalty, data<T>(values), data<T>(slopes),
                     {&into, data<T>(coefficients), /*accumulate=*/true});
    }
  };
  coefficients.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return values;
}

// Not initialised: memory that nothing is written to is never mapped.
Tensor make_slopes(const std::vector<GramPlan>& waves, const Tensor& like, ScalarType type) {
  int64_t size = 0;
  for (const GramPlan& wave : waves) size = std::max(size, wave.slopes_size);
  return torch::stable::new_empty(like, {size}, type);
}

Tensor add_gram_penalty_grad_(std::vector<Tensor> weights, std::vector<Tensor> biases,
                              std::vector<Tensor> pruned, std::vector<Tensor> targets,
                              std::vector<Tensor> grads, std::vector<Tensor> bias_grads,
                              Tensor coefficients, std::vector<int64_t> groups,
                              std::vector<int64_t> columns, std::vector<double> offsets,
                              std::string penalty, std::string precision) {
  read_precision(precision);
  const std::vector<Layer> layers =
      read_layers(weights, biases, groups, columns, {penalty, offsets, pruned, targets});
  check_coefficients(coefficients, weights);
  const std::vector<Gradient> into = read_gradients(weights, biases, grads, bias_grads);
  const std::vector<GramPlan> waves = plan_add(layers, is_double(weights), penalty);
  return add_penalty(layers, waves, penalty, into, coefficients,
                     make_slopes(waves, coefficients, compute_type(weights)));
}

// Keeps its slopes: memory of every step would have to be mapped anew.
class PreparedOnCpu : public Prepared {
 public:
  explicit PreparedOnCpu(Arguments given)
      : Prepared(std::move(given)),
        waves_(plan_add(layers(), is_double(arguments().weights), arguments().of.penalty)),
        slopes_(make_slopes(waves_, arguments().weights[0], compute_type(arguments().weights))) {}

 protected:
  Tensor add_to(const std::vector<Gradient>& gradients, const Tensor& coefficients) override {
    return add_penalty(layers(), waves_, arguments().of.penalty, gradients, coefficients, slopes_);
  }

 private:
  const std::vector<GramPlan> waves_;
  const Tensor slopes_;
};

int64_t prepare_gram_penalty(std::vector<Tensor> weights, std::vector<Tensor> biases,
                             std::vector<Tensor> pruned, std::vector<Tensor> targets,
                             std::vector<int64_t> groups, std::vector<int64_t> columns,
                             std::vector<double> offsets, std::string penalty,
                             std::string precision) {
  return keep_prepared(std::make_unique<PreparedOnCpu>(Prepared::Arguments{
      weights, biases, groups, columns, {penalty, offsets, pruned, targets}, precision}));
}

}  // namespace
}  // namespace orthoreg::cpu

STABLE_TORCH_LIBRARY_IMPL(orthoreg, CPU, m) {
  m.impl("gram_penalty", TORCH_BOX(&orthoreg::cpu::gram_penalty));
  m.impl("gram_penalty_grad", TORCH_BOX(&orthoreg::cpu::gram_penalty_grad));
  m.impl("add_gram_penalty_grad_", TORCH_BOX(&orthoreg::cpu::add_gram_penalty_grad_));
  m.impl("prepare_gram_penalty", TORCH_BOX(&orthoreg::cpu::prepare_gram_penalty));
}
