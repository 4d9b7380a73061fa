// Forming Gram matrices, for the operators that need them.
#pragma once

#include "launch.h"

namespace orthoreg::cuda {

// S of the layers of a wave, or G where penalty < 0, in `out`, laid out as the wave says; and
// values[l] = offset_l + the penalty of each of its layers, where values is not null.
//   values: [wave.count()] in the computing precision
void form_grams(const std::vector<Layer>& layers, const Wave& wave, Product product, int penalty,
                Tables& tables, const Tensor& out, void* values, cudaStream_t stream);

}  // namespace orthoreg::cuda
