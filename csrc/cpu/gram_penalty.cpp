// gram_penalty, gram_penalty_grad, add_gram_penalty_grad_ and its prepared form on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../common/entrywise.h"
#include "../common/prepared.h"
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

// In: a panel of G below the diagonal. Out: the same panel of S = phi'(R). Returns its part of
// sum phi(R), the entries off the diagonal counted twice.
template <class Penalty, class T>
double apply(T* g, int64_t rows, int64_t columns, int64_t ld, const double* diagonal,
             const Rows<T>& of) {
  double once = 0, twice = 0;
  for (int64_t i = 0; i < rows; ++i) {
    T* row = g + i * ld;
    for (int64_t j = 0; j < std::min(i, columns); ++j) {
      const bool counts = !Penalty::kMarked || Penalty::counts(of.is_marked(i), of.is_marked(j));
      const T r = counts ? row[j] : T(0);
      twice += Penalty::value(r);
      row[j] = Penalty::slope(r);
    }
    if (i < columns) {
      constexpr Diagonal kind = Penalty::kDiagonal;
      const double target = kind == Diagonal::kTarget ? of.target(i) : 0;
      const bool counts = kind != Diagonal::kFree &&
                          (!Penalty::kMarked || Penalty::counts(of.is_marked(i), of.is_marked(i)));
      const T r = counts ? static_cast<T>(diagonal[i] - target) : T(0);
      once += Penalty::value(r);
      row[i] = Penalty::slope(r);
    }
  }
  return once + 2 * twice;
}

// In: G [m, m] of one matrix. Out: S, with S_ij = phi'(C_ij) / sqrt(G_ii G_jj) off the diagonal of
// the cosines C and S_ii = -sum_j phi'(C_ij) C_ij / G_ii on it. Returns sum phi(C) off the
// diagonal. Rows of zeros have the cosine 0 with every other one.
template <class Penalty, class T>
double apply_to_cosines(T* g, int64_t m, const std::vector<double>& square) {
  std::vector<double> inverse(m);
  for (int64_t i = 0; i < m; ++i) inverse[i] = square[i] == 0 ? 0 : 1 / std::sqrt(square[i]);
  double value = 0;
  for (int64_t i = 0; i < m; ++i) {
    T* row = g + i * m;
    double turn = 0;
    for (int64_t j = 0; j < m; ++j) {
      if (j == i) continue;
      const double scale = inverse[i] * inverse[j], cosine = row[j] * scale;
      const double slope = Penalty::slope(cosine);
      value += Penalty::value(cosine);
      turn += slope * cosine;
      row[j] = static_cast<T>(slope * scale);
    }
    row[i] = static_cast<T>(-turn * inverse[i] * inverse[i]);
  }
  return value;
}

template <class T>
void values_and_slopes(const std::vector<Layer>& layers, const std::vector<Matrix<T>>& matrices,
                       const Units& units, const std::string& penalty, T* values, T* slopes) {
  std::vector<double> parts(units.list.size());
  std::vector<std::vector<double>> squares(layers.size());  // the diagonals, where they are needed
  std::vector<double> sums(layers.size());
  visit_penalty(penalty, [&](auto functor) {
    using Penalty = decltype(functor);
    for (size_t l = 0; l < layers.size() && Penalty::kCosines; ++l) {
      squares[l].resize(layers[l].groups * layers[l].m());
    }
    for_each_gram_panel<T>(
        layers, matrices, units, slopes,
        [&](int64_t u, T* g, int64_t rows, int64_t columns, int64_t ld, const double* diagonal) {
          const Unit& unit = units.list[u];
          const Layer& layer = layers[unit.layer];
          if constexpr (Penalty::kCosines) {
            std::copy(diagonal, diagonal + columns,
                      squares[unit.layer].begin() + unit.group * layer.m() + unit.column);
          } else {
            parts[u] = apply<Penalty>(g, rows, columns, ld, diagonal,
                                      Rows<T>(layer, unit.group, unit.column));
          }
        });
    for (size_t l = 0; l < layers.size() && Penalty::kCosines; ++l) {
      const int64_t m = layers[l].m();
      for (int64_t group = 0; group < layers[l].groups; ++group) {
        const auto first = squares[l].begin() + group * m;
        sums[l] += apply_to_cosines<Penalty>(slopes + layers[l].slopes + group * m * m, m,
                                             std::vector<double>(first, first + m));
      }
    }
  });
  for (size_t u = 0; u < parts.size(); ++u) sums[units.list[u].layer] += parts[u];
  for (size_t l = 0; l < layers.size(); ++l) values[l] = static_cast<T>(sums[l] + layers[l].offset);
}

Units gradient_panels(const std::vector<Layer>& layers) {
  return make_units(
      layers, [](const Layer& layer) { return layer.width(); },
      [](const Layer& layer, int64_t column) {
        return static_cast<double>(layer.n) * std::min(kPanel, layer.width() - column) * layer.m();
      });
}

// Writes 2 c_l S W (rows) or 2 c_l W S (columns) to the gradients, or adds it to them; pruned
// filters get 0.
template <class T>
void gradients(const std::vector<Layer>& layers, const std::vector<Matrix<T>>& matrices,
               const Units& units, const T* slopes, const T* coefficients,
               const std::vector<Gradient>& grads, bool accumulate) {
  const Kernels<T>& kernel = kernels<T>();
  for_each_unit(
      static_cast<int64_t>(units.list.size()), units.work,
      [] { return std::pair(std::vector<T>(kDepth * kPanel), std::vector<T>()); },
      [&](int64_t u, auto& scratch) {
        const Unit& unit = units.list[u];
        const Layer& layer = layers[unit.layer];
        const Matrix<T>& matrix = matrices[unit.layer];
        const int64_t m = layer.m(), j0 = unit.column;
        const int64_t columns = std::min(kPanel, layer.width() - j0);
        const Strided<T> w{matrix.data + unit.group * layer.n * matrix.stride, matrix.stride, 1};
        const Strided<T> s{slopes + layer.slopes + unit.group * m * m, m, 1};
        const Strided<T>&a = layer.columns ? w : s, &b = layer.columns ? s : w;
        std::vector<T>& panel = scratch.second;
        panel.resize(std::max<size_t>(panel.size(), layer.n * kPanel));
        kernel.product(a, {b.at(0, j0), b.rows, 1}, layer.n, columns, m, panel.data(), kPanel,
                       scratch.first.data());
        const T factor = 2 * coefficients[unit.layer];
        const Gradient& grad = grads[unit.layer];
        visit_type(layer.dtype, [&](auto element) {
          using E = decltype(element);
          for (int64_t i = 0; i < layer.n; ++i) {
            const int64_t filter = unit.group * layer.n + i;
            T* from = panel.data() + i * kPanel;
            if (layer.is_pruned(filter))
              std::fill(from, from + columns, T(0));  // also where NaN is
            E* row = static_cast<E*>(grad.weight) + filter * grad.stride + j0;
            const int64_t entries = std::min(columns, layer.k - j0);
            for (int64_t j = 0; j < entries; ++j) {
              row[j] =
                  static_cast<E>((accumulate ? static_cast<T>(row[j]) : T(0)) + factor * from[j]);
            }
            if (entries < columns) {
              E* bias = static_cast<E*>(grad.bias) + filter;
              *bias = static_cast<E>((accumulate ? static_cast<T>(*bias) : T(0)) +
                                     factor * from[entries]);
            }
          }
        });
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
    values_and_slopes<T>(layers, read_matrices<T>(layers), gram_panels(layers), penalty,
                         data<T>(values), data<T>(slopes));
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
    gradients<T>(layers, read_matrices<T>(layers), gradient_panels(layers), data<T>(slopes),
                 data<T>(coefficients), into, /*accumulate=*/false);
  };
  is_double(weights) ? run(double{}) : run(float{});
  grads.insert(grads.end(), bias_grads.begin(), bias_grads.end());
  return grads;
}

Tensor add_penalty(const std::vector<Layer>& layers, const Units& gram, const Units& gradient,
                   const std::string& penalty, const std::vector<Gradient>& into,
                   const Tensor& coefficients) {
  const int64_t count = static_cast<int64_t>(layers.size());
  Tensor values = torch::stable::new_empty(coefficients, {count});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Matrix<T>> matrices = read_matrices<T>(layers);
    std::vector<T> slopes(slopes_size(layers));
    values_and_slopes<T>(layers, matrices, gram, penalty, data<T>(values), slopes.data());
    gradients<T>(layers, matrices, gradient, slopes.data(), data<T>(coefficients), into,
                 /*accumulate=*/true);
  };
  coefficients.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return values;
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
  return add_penalty(layers, gram_panels(layers), gradient_panels(layers), penalty, into,
                     coefficients);
}

class PreparedOnCpu : public Prepared {
 public:
  explicit PreparedOnCpu(Arguments given)
      : Prepared(std::move(given)),
        gram_(gram_panels(layers())),
        gradient_(gradient_panels(layers())) {}

 protected:
  Tensor add_to(const std::vector<Gradient>& gradients, const Tensor& coefficients) override {
    return add_penalty(layers(), gram_, gradient_, arguments().of.penalty, gradients, coefficients);
  }

 private:
  const Units gram_, gradient_;
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
