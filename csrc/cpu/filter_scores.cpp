// filter_scores and accumulate_fisher_ on the CPU: all criteria of a dimension from one pass over
// weight and gradient, summed in double.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "../common/scores.h"
#include "matrices.h"

namespace orthoreg::cpu {
namespace {

constexpr int64_t kChunk = 1024;        // entries gathered at once
constexpr int64_t kScoresAtATime = 16;  // scores of a unit

struct ScoreSums : Sums {
  double square_w_fisher = 0;
};

double score(Criterion criterion, const ScoreSums& sums) {
  switch (criterion) {
    case Criterion::kL1:
      return sums.abs_w;
    case Criterion::kL2:
      return std::sqrt(sums.square_w);
    case Criterion::kTaylor:
      return std::fabs(sums.wg);
    case Criterion::kTaylorSq:
      return sums.square_wg;
    case Criterion::kTaylorAbs:
      return sums.abs_wg;
    case Criterion::kFisher:
      return sums.wg * sums.wg;
    case Criterion::kFisherDiag:
      return sums.square_w_fisher;
  }
  return 0;
}

// Collects scattered or narrow entries and sums them a chunk at a time.
template <class T>
class Gather {
 public:
  explicit Gather(bool with_grads) : w_(kChunk), g_(with_grads ? kChunk : 0) {}

  template <class E>
  void add(const E* w, const E* g, int64_t count, int64_t stride, Sums* sums) {
    for (int64_t i = 0; i < count; ++i) {
      w_[size_] = static_cast<T>(w[i * stride]);
      if (g != nullptr) g_[size_] = static_cast<T>(g[i * stride]);
      if (++size_ == kChunk) flush(sums);
    }
  }

  void flush(Sums* sums) {
    kernels<T>().sums(w_.data(), g_.empty() ? nullptr : g_.data(), size_, sums);
    size_ = 0;
  }

 private:
  std::vector<T> w_, g_;
  int64_t size_ = 0;
};

// Adds w^2 F over `count` entries.
template <class T, class E>
void add_fisher(const ScoreLayer& layer, int64_t i, int64_t start, int64_t count, int64_t stride,
                ScoreSums* sums) {
  if (layer.fisher == nullptr) return;
  const E* w = static_cast<const E*>(layer.weight) + i * layer.stride + start;
  const T* f = static_cast<const T*>(layer.fisher) + i * layer.fisher_stride + start;
  for (int64_t j = 0; j < count; ++j) {
    const double x = static_cast<T>(w[j * stride]);
    sums->square_w_fisher += x * x * f[j * stride];
  }
}

template <class T, class E>
ScoreSums filter_sums(const ScoreLayer& layer, int64_t i, Gather<T>& gather) {
  ScoreSums sums;
  const E* w = static_cast<const E*>(layer.weight) + i * layer.stride;
  const E* g = layer.grad ? static_cast<const E*>(layer.grad) + i * layer.grad_stride : nullptr;
  if constexpr (std::is_same_v<T, E>) {
    kernels<T>().sums(w, g, layer.k, &sums);
  } else {
    gather.add(w, g, layer.k, 1, &sums);
  }
  if (layer.bias != nullptr) {
    const E* bias_grad = layer.bias_grad ? static_cast<const E*>(layer.bias_grad) + i : nullptr;
    gather.add(static_cast<const E*>(layer.bias) + i, bias_grad, 1, 1, &sums);
  }
  gather.flush(&sums);
  add_fisher<T, E>(layer, i, 0, layer.k, 1, &sums);
  return sums;
}

template <class T, class E>
ScoreSums input_sums(const ScoreLayer& layer, int64_t input, Gather<T>& gather) {
  ScoreSums sums;
  const int64_t group = input / layer.inputs, channel = input % layer.inputs;
  for (int64_t i = group * layer.n; i < (group + 1) * layer.n; ++i) {
    const int64_t start = channel * layer.input_stride;
    const E* w = static_cast<const E*>(layer.weight) + i * layer.stride + start;
    const E* g =
        layer.grad ? static_cast<const E*>(layer.grad) + i * layer.grad_stride + start : nullptr;
    gather.add(w, g, layer.taps, layer.tap_stride, &sums);
    add_fisher<T, E>(layer, i, start, layer.taps, layer.tap_stride, &sums);
  }
  gather.flush(&sums);
  return sums;
}

// F += g^2, each filter by one thread.
template <class T>
void accumulate(const std::vector<ScoreLayer>& layers) {
  struct Unit {
    const ScoreLayer* layer;
    int64_t row;
  };
  std::vector<Unit> units;
  double work = 0;
  for (const ScoreLayer& layer : layers) {
    for (int64_t i = 0; i < layer.rows(); ++i) units.push_back({&layer, i});
    work += static_cast<double>(layer.rows()) * layer.k;
  }
  for_each_unit(
      static_cast<int64_t>(units.size()), work, [] { return 0; },
      [&](int64_t u, int) {
        const ScoreLayer& l = *units[u].layer;
        T* f = static_cast<T*>(l.fisher) + units[u].row * l.fisher_stride;
        visit_type(l.dtype, [&](auto element) {
          using E = decltype(element);
          const E* g = static_cast<const E*>(l.grad) + units[u].row * l.grad_stride;
          for (int64_t j = 0; j < l.k; ++j) {
            const T slope = static_cast<T>(g[j]);
            f[j] += slope * slope;
          }
        });
      });
}

// The scores of filters or of input channels.
template <class T>
void run(const ScoreTask& task, bool of_rows, T* out) {
  struct Unit {
    const ScoreLayer* layer;
    int64_t first;
  };
  const auto scores = [&](const ScoreLayer& layer) {
    return of_rows ? layer.rows() : layer.groups * layer.inputs;
  };
  std::vector<Unit> units;
  double work = 0;
  for (const ScoreLayer& layer : task.layers) {
    for (int64_t i = 0; i < scores(layer); i += kScoresAtATime) units.push_back({&layer, i});
    work += static_cast<double>(layer.rows()) * layer.k;
  }
  for_each_unit(
      static_cast<int64_t>(units.size()), work, [&] { return Gather<T>(task.with_grads); },
      [&](int64_t u, Gather<T>& gather) {
        const ScoreLayer& layer = *units[u].layer;
        const int64_t last = std::min(units[u].first + kScoresAtATime, scores(layer));
        T* to = out + (of_rows ? layer.first : layer.first_inputs);
        visit_type(layer.dtype, [&](auto element) {
          using E = decltype(element);
          for (int64_t i = units[u].first; i < last; ++i) {
            const ScoreSums sums =
                of_rows ? filter_sums<T, E>(layer, i, gather) : input_sums<T, E>(layer, i, gather);
            for (size_t c = 0; c < task.criteria.size(); ++c) {
              to[c * task.total + i] = static_cast<T>(score(task.criteria[c], sums));
            }
          }
        });
      });
}

Tensor compute(const ScoreTask& task, const std::vector<Tensor>& weights) {
  Tensor out = torch::stable::new_empty(
      weights[0], {static_cast<int64_t>(task.criteria.size()), task.total}, compute_type(weights));
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    if (task.with_fisher) accumulate<T>(task.layers);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if (scores_rows(task.dim)) run<T>(task, true, to);
    if (scores_columns(task.dim)) run<T>(task, false, to);
  };
  is_double(weights) ? launch(double{}) : launch(float{});
  return out;
}

Tensor filter_scores(std::vector<Tensor> weights, std::vector<Tensor> grads,
                     std::vector<Tensor> biases, std::vector<Tensor> bias_grads,
                     std::vector<int64_t> groups, int64_t dim, std::vector<std::string> names) {
  return compute(read_scores(weights, grads, biases, bias_grads, {}, groups, dim, names), weights);
}

Tensor accumulate_fisher(std::vector<Tensor> weights, std::vector<Tensor> grads,
                         std::vector<Tensor> fisher, std::vector<int64_t> groups, int64_t dim,
                         std::vector<std::string> names) {
  return compute(read_fisher_scores(weights, grads, fisher, groups, dim, names), weights);
}

}  // namespace
}  // namespace orthoreg::cpu

STABLE_TORCH_LIBRARY_IMPL(orthoreg, CPU, m) {
  m.impl("filter_scores", TORCH_BOX(&orthoreg::cpu::filter_scores));
  m.impl("accumulate_fisher_", TORCH_BOX(&orthoreg::cpu::accumulate_fisher));
}
