// From checked layers to launches of the tiled kernels.
#pragma once

#include <memory>
#include <vector>

#include "problem.cuh"
#include "runtime.h"

namespace orthoreg::cuda {

inline Type element_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return Type::kFloat;
  }
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline std::vector<Shape> shapes(const std::vector<Layer>& layers) {
  std::vector<Shape> out;
  for (const Layer& l : layers) out.push_back({l.groups, l.n, l.width(), l.columns});
  return out;
}

// Layers that are worked on together: theirs are the entries [first, last) of a call's lists.
struct Wave {
  int first, last;
  Plan plan;
  // Where each layer's S lies in the wave's buffer, and from row to row.
  std::vector<int64_t> slopes;
  std::vector<int32_t> slope_stride;
  int64_t slopes_size = 0;

  int count() const { return last - first; }
};

// All layers at once, S laid out as the operators say: [groups, m, m] after [groups, m, m]. The
// plan is empty.
Wave whole_wave(const std::vector<Layer>& layers);

// The parameters of a launch, and what was found out for it.
struct Table {
  Problems problems;
  int resident = 0;  // the blocks that the device holds at a time, 0 before the first launch
};

// The parameters of the launches of a call, one after the other. A call that makes the same
// launches for layers of the same form, after rewind(), finds them described and only points them
// to where the tensors are now.
class Tables {
 public:
  // grads is empty for Gram kernels.
  Table& next(const std::vector<Layer>& layers, const Wave& wave, const Launch& launch,
              const std::vector<Gradient>& grads, int penalty);
  void rewind() { next_ = 0; }

 private:
  std::vector<std::unique_ptr<Table>> tables_;
  size_t next_ = 0;
};

// How many blocks of a kernel the current device holds at a time; allows the kernel that much
// shared memory before its first launch.
int resident_blocks(const void* kernel, int threads, int shared);

// The product that the current device can do: tensor cores have TF32 and bfloat16 from sm_80 on,
// and only code that was compiled for it speaks to them.
Product usable(Product product);

// The tile size of all layers: 64 without tensor cores; else 0, the best one for each layer, or
// what ORTHOREG_EXT_TILE says (32, 64 or 128: for tests, and for tuning on a new GPU).
int tile_of_all(Product product);

template <class T>
struct As {
  using Type = T;
};

// Launches at most `most` blocks, one a unit. The arguments are passed by address: a table of
// layers is copied once, by the runtime.
template <class... Parameters>
void launch_blocks(void (*kernel)(Parameters...), int64_t units, int64_t most, int threads,
                   int shared, cudaStream_t stream,
                   const typename As<Parameters>::Type&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const dim3 blocks(static_cast<unsigned>(std::min(units, most)));
  ORTHOREG_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(threads),
                                       addresses, shared, stream));
}

// Launches a kernel on the layers of a table, its first parameter.
template <class... Rest>
void launch(void (*kernel)(Problems, Rest...), Table& table, bool all_units, int threads,
            int shared, cudaStream_t stream, const typename As<Rest>::Type&... arguments) {
  if (table.resident == 0) {
    table.resident = resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared);
  }
  const int64_t units = table.problems.units;
  launch_blocks(kernel, units, all_units ? units : table.resident, threads, shared, stream,
                table.problems, arguments...);
}

// Launches a kernel whose blocks take units in turns: as many as the device holds at a time.
template <class... Rest>
void launch_persistent(void (*kernel)(Problems, Rest...), Table& table, int threads, int shared,
                       cudaStream_t stream, const typename As<Rest>::Type&... arguments) {
  launch(kernel, table, false, threads, shared, stream, arguments...);
}

// Launches a kernel with one block a unit.
template <class... Rest>
void launch_all(void (*kernel)(Problems, Rest...), Table& table, int threads, int shared,
                cudaStream_t stream, const typename As<Rest>::Type&... arguments) {
  launch(kernel, table, true, threads, shared, stream, arguments...);
}

}  // namespace orthoreg::cuda
