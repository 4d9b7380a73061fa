#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

namespace orthoreg::cuda {

namespace {
// Which of the compiled architectures a device runs is asked of this kernel.
__global__ void code_of_this_device() {}
}  // namespace

Wave whole_wave(const std::vector<Layer>& layers) {
  Wave wave{0, static_cast<int>(layers.size()), {}, {}, {}};
  for (const Layer& l : layers) {
    wave.slopes.push_back(l.slopes);
    wave.slope_stride.push_back(static_cast<int32_t>(l.m()));
  }
  wave.slopes_size = slopes_size(layers);
  return wave;
}

namespace {

// What does not depend on where the tensors are.
std::unique_ptr<Table> describe(const std::vector<Layer>& layers, const Wave& wave,
                                const Launch& launch, int penalty) {
  auto table = std::make_unique<Table>();  // 30 KB, too much for some stacks
  table->problems.count = static_cast<int32_t>(launch.items.size());
  table->problems.units = static_cast<int32_t>(launch.units);
  table->problems.penalty = penalty;
  Problem* p = table->problems.layer;
  for (const Item& item : launch.items) {
    const Layer& l = layers[wave.first + item.layer];
    p->marks = l.marked != nullptr;
    p->stride = l.stride;
    p->slopes = wave.slopes[item.layer];
    p->slope_stride = wave.slope_stride[item.layer];
    p->offset = l.offset;
    p->n = static_cast<int32_t>(l.n);
    p->k = static_cast<int32_t>(l.k);
    p->index = item.layer;
    p->first_unit = static_cast<int32_t>(item.first_unit);
    p->units = static_cast<int32_t>(item.units);
    p->first_part = static_cast<int32_t>(item.first_part);
    p->slices = static_cast<int32_t>(item.slices);
    p->slice_length = static_cast<int32_t>(std::min<int64_t>(item.slice_length, INT32_MAX));
    p->first_slab = static_cast<int32_t>(item.first_slab);
    p->type = element_type(l.dtype);
    p->columns = l.columns;
    p->groups = static_cast<int32_t>(l.groups);
    ++p;
  }
  return table;
}

}  // namespace

Table& Tables::next(const std::vector<Layer>& layers, const Wave& wave, const Launch& launch,
                    const std::vector<Gradient>& grads, int penalty) {
  if (next_ == tables_.size()) tables_.push_back(describe(layers, wave, launch, penalty));
  Table& table = *tables_[next_++];
  Problem* p = table.problems.layer;
  for (const Item& item : launch.items) {
    const Layer& l = layers[wave.first + item.layer];
    p->weight = l.weight;
    p->bias = l.bias;
    p->targets = l.targets;
    p->pruned = p->marks ? l.marked : l.pruned;
    if (!grads.empty()) {
      const Gradient& grad = grads[wave.first + item.layer];
      p->grad = grad.weight;
      p->bias_grad = grad.bias;
      p->grad_stride = grad.stride;
    }
    ++p;
  }
  return table;
}

int resident_blocks(const void* kernel, int threads, int shared) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> blocks_per_sm;
  int device = 0, sms = 0;
  ORTHOREG_CUDA_CHECK(cudaGetDevice(&device));
  ORTHOREG_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = blocks_per_sm.try_emplace({kernel, device}, 0).first;
  if (found->second == 0) {
    ORTHOREG_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    ORTHOREG_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found->second, kernel, threads, shared));
    STD_TORCH_CHECK(found->second > 0, "this GPU cannot hold a block of ", threads,
                    " threads with ", shared, " bytes of shared memory");
  }
  return found->second * sms;
}

int tile_of_all(Product product) {
  if (product == Product::kSimt) return 64;
  const char* text = std::getenv("ORTHOREG_EXT_TILE");
  if (text == nullptr || *text == '\0') return 0;
  const std::string tile(text);
  STD_TORCH_CHECK(tile == "32" || tile == "64" || tile == "128", "ORTHOREG_EXT_TILE is '", tile,
                  "', expected 32, 64 or 128");
  return std::stoi(tile);
}

Product usable(Product product) {
  static std::mutex mutex;
  static std::map<int, bool> tensor_cores;
  int device = 0;
  ORTHOREG_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (tensor_cores.count(device) == 0) {
    cudaFuncAttributes attributes{};
    ORTHOREG_CUDA_CHECK(
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(code_of_this_device)));
    tensor_cores[device] = attributes.ptxVersion >= 80;
    int driver = 0;
    ORTHOREG_CUDA_CHECK(cudaDriverGetVersion(&driver));
    STD_TORCH_CHECK(kLayersPerLaunch <= 30 || driver >= 12010, "the NVIDIA driver knows CUDA ",
                    driver / 1000, ".", driver % 1000 / 10,
                    ", and these kernels were compiled for drivers of CUDA 12.1 or newer: update "
                    "the driver, or rebuild with an older CUDA toolkit");
  }
  return tensor_cores[device] ? product : Product::kSimt;
}

}  // namespace orthoreg::cuda
