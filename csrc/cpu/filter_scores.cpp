// filter_scores and accumulate_fisher_ on the CPU: all criteria of both dimensions from one pass
// over weight, gradient and accumulator.
//
// A unit of work is a block of filters. Its kernel call gives the sums of each filter, and those of
// each column of the block, which are added over the taps of an input channel. Where a group of
// filters is more than one block, whoever ends its last block adds the blocks in order, so that
// nothing depends on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "../common/scores.h"
#include "matrices.h"
#include "score_kernels.h"

namespace orthoreg::cpu {
namespace {

constexpr int64_t kUnitEntries = 1 << 17;
constexpr int64_t kMostRows = 256;  // of a unit, so that its scratch memory stays in the cache
// With columns a unit has a multiple of what kernels take together.
constexpr int64_t kRowsTogether = 32;

struct Sums {
  double of[kStatistics];
};

double score(Criterion criterion, const Sums& sums) {
  switch (criterion) {
    case Criterion::kL1:
      return sums.of[kAbsW];
    case Criterion::kL2:
      return std::sqrt(sums.of[kSquareW]);
    case Criterion::kTaylor:
      return std::fabs(sums.of[kWg]);
    case Criterion::kTaylorSq:
      return sums.of[kSquareWg];
    case Criterion::kTaylorAbs:
      return sums.of[kAbsWg];
    case Criterion::kFisher:
      return sums.of[kWg] * sums.of[kWg];
    case Criterion::kFisherDiag:
      return sums.of[kSquareWFisher];
  }
  return 0;
}

void add(Sums* sums, double w, double g, double f) {
  const double product = w * g;
  sums->of[kAbsW] += std::fabs(w);
  sums->of[kSquareW] += w * w;
  sums->of[kAbsWg] += std::fabs(product);
  sums->of[kWg] += product;
  sums->of[kSquareWg] += product * product;
  sums->of[kSquareWFisher] += w * w * f;
}

// Whether squares or products of floats may have left the range in which the kernels are precise:
// that shows in sums that are tiny or not finite.
bool outside_float(const ScoreLayer& layer, const Sums& sums) {
  constexpr double kTiny = 0x1p-90;
  if (layer.dtype == ScalarType::Double || sums.of[kAbsW] == 0) return false;
  const auto outside = [&](Statistic s) { return !(sums.of[s] >= kTiny && sums.of[s] <= 1e38); };
  if (outside(kAbsW) || outside(kSquareW)) return true;
  if (layer.fisher != nullptr && outside(kSquareWFisher)) return true;
  return layer.grad != nullptr && sums.of[kAbsWg] != 0 && (outside(kAbsWg) || outside(kSquareWg));
}

// The sums, in double, of the entries of `rows` filters from `row` on: `taps` of each, tap_stride
// apart from `start` on.
Sums sums_in_double(const ScoreLayer& layer, int64_t row, int64_t rows, int64_t start, int64_t taps,
                    int64_t tap_stride) {
  Sums sums{};
  visit_type(layer.dtype, [&](auto element) {
    using E = decltype(element);
    using T = std::conditional_t<sizeof(E) == 8, double, float>;
    const E* w = static_cast<const E*>(layer.weight);
    const E* g = static_cast<const E*>(layer.grad);
    const T* f = static_cast<const T*>(layer.fisher);
    for (int64_t i = row; i < row + rows; ++i) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t j = start + tap * tap_stride;
        add(&sums, static_cast<T>(w[i * layer.stride + j]),
            g ? static_cast<T>(g[i * layer.grad_stride + j]) : T(0),
            f ? f[i * layer.fisher_stride + j] : T(0));
      }
    }
  });
  return sums;
}

// Each input channel has the entries of one filter, as in a depthwise convolution.
bool inputs_are_filters(const ScoreLayer& layer) { return layer.n == 1 && layer.inputs == 1; }

// Where the scores go.
template <class T>
struct Output {
  const ScoreTask& task;
  T* scores;  // [criteria, total]

  void put(int64_t place, const Sums& sums) const {
    for (size_t c = 0; c < task.criteria.size(); ++c) {
      scores[c * task.total + place] = static_cast<T>(score(task.criteria[c], sums));
    }
  }

  void put_filter(const ScoreLayer& layer, int64_t row, Sums sums) const {
    if (outside_float(layer, sums)) sums = sums_in_double(layer, row, 1, 0, layer.k, 1);
    if (scores_columns(task.dim) && inputs_are_filters(layer)) put(layer.first_inputs + row, sums);
    if (!scores_rows(task.dim)) return;
    if (layer.bias != nullptr) {
      visit_type(layer.dtype, [&](auto element) {
        using E = decltype(element);
        const E* g = static_cast<const E*>(layer.bias_grad);
        add(&sums, static_cast<T>(static_cast<const E*>(layer.bias)[row]),
            g ? static_cast<T>(g[row]) : T(0), 0);
      });
    }
    put(layer.first + row, sums);
  }

  void put_input(const ScoreLayer& layer, int64_t group, int64_t input, Sums sums) const {
    if (outside_float(layer, sums)) {
      sums = sums_in_double(layer, group * layer.n, layer.n, input * layer.input_stride, layer.taps,
                            layer.tap_stride);
    }
    put(layer.first_inputs + group * layer.inputs + input, sums);
  }
};

// Filters [row, row + rows) of a layer: of whole groups, or block `block` of the `blocks` of one.
struct Unit {
  const ScoreLayer* layer;
  int64_t row, rows;
  bool columns;  // needs the sums of its columns
  int64_t block = 0, blocks = 1;
  int64_t partial = 0;  // where the blocks' sums [blocks, inputs] start
  int64_t ticket = 0;   // counts the blocks that are done
};

// The units of a call, and the memory that they need.
struct Units {
  std::vector<Unit> list;
  double work = 0;
  int64_t partials = 0, tickets = 0;
  int64_t rows = 0, column_rows = 0, columns = 0, inputs = 0;  // the most of one unit

  explicit Units(const ScoreTask& task) {
    for (const ScoreLayer& layer : task.layers) {
      work += static_cast<double>(layer.rows()) * layer.k;
      if (!scores_columns(task.dim) || inputs_are_filters(layer)) {
        add_blocks(layer, 0, layer.rows(), rows_of(layer), false);
      } else {
        add_groups(layer);
        columns = std::max(columns, (layer.k + kScoreLanes - 1) / kScoreLanes * kScoreLanes);
        inputs = std::max(inputs, layer.inputs);
      }
    }
  }

 private:
  // As many rows as make a unit worth its overhead, which are read on and on.
  static int64_t rows_of(const ScoreLayer& layer) {
    return std::clamp<int64_t>(kUnitEntries / std::max<int64_t>(layer.k, 1), 1, kMostRows);
  }

  // With columns so many that the sums of the block's input channels are a small part of it.
  static int64_t rows_with_columns(const ScoreLayer& layer) {
    const int64_t least = layer.taps > 1 ? 64 : 128;
    return std::max(rows_of(layer) / kRowsTogether * kRowsTogether, least);
  }

  void add_blocks(const ScoreLayer& layer, int64_t first, int64_t count, int64_t most,
                  bool with_columns) {
    Unit unit{&layer, first, 0, with_columns};
    unit.blocks = (count + most - 1) / most;
    if (with_columns && unit.blocks > 1) {
      unit.partial = partials;
      unit.ticket = tickets++;
      partials += unit.blocks * layer.inputs;
    }
    for (; unit.block < unit.blocks; ++unit.block) {
      unit.row = first + unit.block * most;
      unit.rows = std::min(most, first + count - unit.row);
      push(unit);
    }
  }

  void add_groups(const ScoreLayer& layer) {
    const int64_t most = rows_with_columns(layer);
    if (layer.n > most) {
      for (int64_t group = 0; group < layer.groups; ++group) {
        add_blocks(layer, group * layer.n, layer.n, most, true);
      }
      return;
    }
    const int64_t together = layer.n == 0 ? layer.groups : most / layer.n;
    for (int64_t group = 0; group < layer.groups; group += together) {
      const int64_t last = std::min(group + together, layer.groups);
      push({&layer, group * layer.n, (last - group) * layer.n, true});
    }
  }

  void push(const Unit& unit) {
    list.push_back(unit);
    rows = std::max(rows, unit.rows);
    if (unit.columns) column_rows = std::max(column_rows, unit.rows);
  }
};

// The memory of one thread.
struct Scratch {
  std::vector<double> kernel, columns;
  std::vector<Sums> rows, inputs;

  explicit Scratch(const Units& units)
      : kernel((units.column_rows + 1) * kRowScratch),  // + 1: never empty
        columns((units.columns + 1) * kStatistics),
        rows(units.rows + 1),
        inputs(units.inputs) {}
};

// The sums of each input channel from those of the columns, whose memory is used up.
void add_taps(const ScoreLayer& layer, double* columns, int64_t column_stride, Sums* inputs) {
  if (layer.k == 0) {  // input channels without entries
    std::fill_n(inputs, layer.inputs, Sums{});
    return;
  }
  const int statistics = layer.fisher ? kStatistics : layer.grad ? kSquareWg + 1 : kSquareW + 1;
  for (int s = 0; s < statistics; ++s) {
    double* column = columns + s * column_stride;
    if (layer.input_stride == 1) {
      for (int64_t tap = 1; tap < layer.taps; ++tap) {
        const double* next = column + tap * layer.tap_stride;
        for (int64_t c = 0; c < layer.inputs; ++c) column[c] += next[c];
      }
      for (int64_t c = 0; c < layer.inputs; ++c) inputs[c].of[s] = column[c];
    } else {
      for (int64_t c = 0; c < layer.inputs; ++c) {
        const double* entry = column + c * layer.input_stride;
        double sum = 0;
        for (int64_t tap = 0; tap < layer.taps; ++tap) sum += entry[tap * layer.tap_stride];
        inputs[c].of[s] = sum;
      }
    }
  }
  for (int s = statistics; s < kStatistics; ++s) {
    for (int64_t c = 0; c < layer.inputs; ++c) inputs[c].of[s] = 0;
  }
}

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      return Element::kFloat;
  }
}

// Entry (row, 0) of a matrix whose entries have this size.
const void* row_of(const void* data, int64_t row, int64_t stride, int64_t size) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + row * stride * size;
}

// Scores the filters of `rows` rows from `row` on, and returns the sums of their columns in
// scratch.columns if they are wanted.
template <class T>
void score_rows(const ScoreLayer& layer, int64_t row, int64_t rows, bool with_columns,
                const Output<T>& out, Scratch& scratch) {
  const int64_t size = layer.dtype == ScalarType::Double  ? 8
                       : layer.dtype == ScalarType::Float ? 4
                                                          : 2;
  const int64_t stride = (layer.k + kScoreLanes - 1) / kScoreLanes * kScoreLanes;
  if (with_columns && rows == 0) std::fill(scratch.columns.begin(), scratch.columns.end(), 0);
  score_kernel(element_of(layer.dtype))(
      {row_of(layer.weight, row, layer.stride, size),
       row_of(layer.grad, row, layer.grad_stride, size),
       const_cast<void*>(row_of(layer.fisher, row, layer.fisher_stride, sizeof(T))), layer.stride,
       layer.grad_stride, layer.fisher_stride, rows, layer.k, scratch.rows.data()->of,
       with_columns ? scratch.columns.data() : nullptr, stride, scratch.kernel.data()});
  if (!scores_rows(out.task.dim) && with_columns) return;
  for (int64_t i = 0; i < rows; ++i) out.put_filter(layer, row + i, scratch.rows[i]);
}

template <class T>
void run(const ScoreTask& task, const std::vector<Tensor>& weights, T* scores) {
  const Units units(task);
  const Output<T> out{task, scores};
  Tensor workspace;
  Sums* partials = nullptr;
  if (units.partials > 0) {
    workspace =
        torch::stable::new_empty(weights[0], {units.partials * kStatistics}, ScalarType::Double);
    partials = static_cast<Sums*>(workspace.mutable_data_ptr());
  }
  std::vector<std::atomic<int64_t>> done(units.tickets);
  for_each_unit(
      static_cast<int64_t>(units.list.size()), units.work, [&] { return Scratch(units); },
      [&](int64_t u, Scratch& scratch) {
        const Unit& unit = units.list[u];
        const ScoreLayer& layer = *unit.layer;
        if (!unit.columns) return score_rows(layer, unit.row, unit.rows, false, out, scratch);
        const int64_t stride = (layer.k + kScoreLanes - 1) / kScoreLanes * kScoreLanes;
        if (unit.blocks == 1) {
          const int64_t first = layer.n == 0 ? 0 : unit.row / layer.n;
          const int64_t last = layer.n == 0 ? layer.groups : (unit.row + unit.rows) / layer.n;
          for (int64_t group = first; group < last; ++group) {
            score_rows(layer, group * layer.n, layer.n, true, out, scratch);
            add_taps(layer, scratch.columns.data(), stride, scratch.inputs.data());
            for (int64_t c = 0; c < layer.inputs; ++c) {
              out.put_input(layer, group, c, scratch.inputs[c]);
            }
          }
          return;
        }
        score_rows(layer, unit.row, unit.rows, true, out, scratch);
        Sums* first = partials + unit.partial;
        add_taps(layer, scratch.columns.data(), stride, first + unit.block * layer.inputs);
        if (done[unit.ticket].fetch_add(1, std::memory_order_acq_rel) + 1 < unit.blocks) return;
        for (int64_t c = 0; c < layer.inputs; ++c) {
          Sums sums = first[c];
          for (int64_t block = 1; block < unit.blocks; ++block) {
            for (int s = 0; s < kStatistics; ++s) {
              sums.of[s] += first[block * layer.inputs + c].of[s];
            }
          }
          out.put_input(layer, unit.row / layer.n, c, sums);
        }
      });
}

Tensor compute(const ScoreTask& task, const std::vector<Tensor>& weights) {
  Tensor out = torch::stable::new_empty(
      weights[0], {static_cast<int64_t>(task.criteria.size()), task.total}, compute_type(weights));
  void* scores = out.mutable_data_ptr();
  is_double(weights) ? run(task, weights, static_cast<double*>(scores))
                     : run(task, weights, static_cast<float*>(scores));
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
