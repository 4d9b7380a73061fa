// The schema of every operator. Kernels register themselves in csrc/{cpu,cuda}, gradients and shape
// functions in orthoreg_ext/ops.py.
//
// A layer is a weight [groups * n, ...] and a bias [groups * n], empty for none. Layers of one call
// share the device and the computing precision (float64, or float32 for everything else).
//   columns     0: G = W W^T, [n, n];  1: G = W^T W, [k, k]; the bias counts as a column of W
//   slopes      S = phi'(G - T) of all layers and groups, flat, one after the other
//   offsets     added to each layer's value
#include "common/registration.h"

ORTHOREG_LIBRARY(ORTHOREG_NAMESPACE, m) {
  m.def("gram(Tensor[] weights, Tensor[] biases, int[] groups, int[] columns) -> Tensor");
  m.def(
      "gram_penalty(Tensor[] weights, Tensor[] biases, int[] groups, int[] columns, "
      "float[] offsets, str penalty) -> (Tensor values, Tensor slopes)");
  m.def(
      "gram_penalty_grad(Tensor[] weights, Tensor[] biases, Tensor slopes, Tensor coefficients, "
      "int[] groups, int[] columns, str penalty) -> Tensor[]");
  m.def(
      "add_gram_penalty_grad_(Tensor[] weights, Tensor[] biases, Tensor(a!)[] grads, "
      "Tensor(b!)[] bias_grads, Tensor coefficients, int[] groups, int[] columns, float[] offsets, "
      "str penalty) -> Tensor");
  m.def(
      "filter_scores(Tensor[] weights, Tensor[] grads, Tensor[] biases, Tensor[] bias_grads, "
      "int[] groups, int dim, str[] criteria) -> Tensor");
}
