// The schema of every operator. Kernels register themselves in csrc/{cpu,cuda}, gradients and shape
// functions in orthoreg_ext/ops.py.
//
// A layer is a weight [groups * n, ...] and a bias [groups * n], empty for none. Layers of one call
// share the device and the computing precision (float64, or float32 for everything else).
//   columns     0: G = W W^T, [n, n];  1: G = W^T W, [k, k]; the bias counts as a column of W
//   dim         of scores: 0 the filters, 1 the input channels, 2 both, the filters of all layers
//               before all input channels
//   slopes      S = phi'(G - T) of all layers and groups, flat, one after the other
//   offsets     added to each layer's value
//   pruned      empty, or one bool mask [groups * n] a layer, empty for none: filters that read as
//               zeros, have no target and get no gradient, or those that the penalty marks (see
//               common/entrywise.h)
//   targets     empty, or a [groups * n] in the computing precision a layer, empty for none: what
//               stands for 1 on the diagonal of T; columns must be 0
//   precision   a name of common/precision.h; the CPU computes all in the computing precision
//
// A prepared penalty is add_gram_penalty_grad_ with all but the gradients and the coefficients
// given once (common/prepared.h): grads are those of the weights, then of the biases that are not
// empty. The result is empty, and nothing is written, where a tensor is no longer what was
// prepared.
#include "common/registration.h"

ORTHOREG_LIBRARY(ORTHOREG_NAMESPACE, m) {
  m.def(
      "gram(Tensor[] weights, Tensor[] biases, int[] groups, int[] columns, str precision) -> "
      "Tensor");
  m.def(
      "gram_penalty(Tensor[] weights, Tensor[] biases, Tensor[] pruned, Tensor[] targets, "
      "int[] groups, int[] columns, float[] offsets, str penalty, str precision) -> "
      "(Tensor values, Tensor slopes)");
  m.def(
      "gram_penalty_grad(Tensor[] weights, Tensor[] biases, Tensor[] pruned, Tensor[] targets, "
      "Tensor slopes, Tensor coefficients, int[] groups, int[] columns, str penalty, "
      "str precision) -> Tensor[]");
  m.def(
      "add_gram_penalty_grad_(Tensor[] weights, Tensor[] biases, Tensor[] pruned, "
      "Tensor[] targets, Tensor(a!)[] grads, Tensor(b!)[] bias_grads, Tensor coefficients, int[] "
      "groups, "
      "int[] columns, float[] offsets, str penalty, str precision) -> Tensor");
  m.def(
      "prepare_gram_penalty(Tensor[] weights, Tensor[] biases, Tensor[] pruned, "
      "Tensor[] targets, int[] groups, int[] columns, float[] offsets, str penalty, "
      "str precision) -> int");
  m.def(
      "add_prepared_gram_penalty_grad_(int prepared, Tensor(a!)[] grads, Tensor coefficients) -> "
      "Tensor");
  m.def("release_prepared(int prepared) -> ()");
  m.def(
      "filter_scores(Tensor[] weights, Tensor[] grads, Tensor[] biases, Tensor[] bias_grads, "
      "int[] groups, int dim, str[] criteria) -> Tensor");
  m.def(
      "accumulate_fisher_(Tensor[] weights, Tensor[] grads, Tensor(a!)[] fisher, int[] groups, "
      "int dim, str[] criteria) -> Tensor");
  m.def("group_scores(Tensor[] scores, Tensor entries, Tensor starts, str reduction) -> Tensor");
}
