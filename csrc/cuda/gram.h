// Forming Gram matrices, for the operators that need them.
#pragma once

#include "launch.h"

namespace orthoreg::cuda {

// The memory that a call works in, in one allocation: S, the parts of the penalties, and the slices
// of Gram tiles.
class Workspace {
 public:
  // How many numbers of each kind there are, for the wave that takes most.
  struct Sizes {
    int64_t slopes = 0, parts = 0, slabs = 0;

    void fit(const Wave& wave, int penalty) {
      slopes = std::max(slopes, wave.slopes_size);
      if (wave.plan.fused) return;
      const int64_t kinds = penalty < 0 ? 0 : Penalties::takes_cosines(penalty) ? 2 : 1;
      parts = std::max(parts, kinds * wave.plan.parts);
      slabs = std::max(slabs, wave.plan.slab_entries);
    }
  };

  // like: a tensor of the computing precision, on the device.
  Workspace(const Tensor& like, const Sizes& sizes)
      : memory_(torch::stable::new_empty(like, {bytes(sizes, in_double(like)) / 8},
                                         ScalarType::Double)) {
    const int64_t slopes = aligned(sizes.slopes * (in_double(like) ? 8 : 4));
    this->slopes = data<char>(memory_);
    slabs = data<char>(memory_) + slopes;
    parts = data<double>(memory_) + (bytes(sizes, in_double(like)) / 8 - sizes.parts);
  }

  void *slopes, *slabs;  // of the computing precision
  double* parts;

 private:
  static bool in_double(const Tensor& like) { return like.scalar_type() == ScalarType::Double; }
  static int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }
  static int64_t bytes(const Sizes& sizes, bool in_double) {
    const int64_t element = in_double ? 8 : 4;
    return aligned(sizes.slopes * element) + aligned(sizes.slabs * element) + sizes.parts * 8;
  }

  Tensor memory_;
};

// S of the layers of a wave, or G where penalty < 0, in `out`, laid out as the wave says; and
// values[l] = offset_l + the penalty of each of its layers, where values is not null.
//   out, values [wave.count()]: in the computing precision
//   workspace: fits the wave; its slopes may be `out`
void form_grams(const std::vector<Layer>& layers, const Wave& wave, bool in_double, Product product,
                int penalty, Tables& tables, const Workspace& workspace, void* out, void* values,
                cudaStream_t stream);

}  // namespace orthoreg::cuda
