// The registry of prepared penalties, and the operators on it that are the same for every backend.
#include "prepared.h"

#include <map>

#include "registration.h"

namespace orthoreg {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Prepared>> prepared;
  int64_t last = 0;

  // Never destroyed: at the end of the process the tensors' device may be gone before this is.
  static Registry& get() {
    static Registry& registry = *std::make_unique<Registry>().release();
    return registry;
  }
};

Tensor add_prepared(int64_t number, std::vector<Tensor> grads, Tensor coefficients) {
  std::shared_ptr<Prepared> prepared;
  {
    Registry& registry = Registry::get();
    const std::lock_guard<std::mutex> lock(registry.mutex);
    const auto found = registry.prepared.find(number);
    STD_TORCH_CHECK(
        found != registry.prepared.end(), "prepared is ", number,
        ", which no prepare_gram_penalty returned or which was released: prepare again");
    prepared = found->second;
  }
  return prepared->add(grads, coefficients);
}

void release_prepared(int64_t number) {
  std::shared_ptr<Prepared> last_reference;  // ends after the lock
  Registry& registry = Registry::get();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.prepared.find(number);
  if (found == registry.prepared.end()) return;
  last_reference = std::move(found->second);
  registry.prepared.erase(found);
}

}  // namespace

int64_t keep_prepared(std::unique_ptr<Prepared> prepared) {
  Registry& registry = Registry::get();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.prepared.emplace(++registry.last, std::move(prepared));
  return registry.last;
}

}  // namespace orthoreg

ORTHOREG_LIBRARY_IMPL(ORTHOREG_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("add_prepared_gram_penalty_grad_", TORCH_BOX(&orthoreg::add_prepared));
  m.impl("release_prepared", TORCH_BOX(&orthoreg::release_prepared));
}
