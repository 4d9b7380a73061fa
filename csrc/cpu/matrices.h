// The element types behind torch's.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common/layers.h"
#include "parallel.h"

namespace orthoreg::cpu {

// Calls visit(E{}) with the element type behind a ScalarType.
template <class Visit>
void visit_type(ScalarType type, const Visit& visit) {
  switch (type) {
    case ScalarType::Double:
      return visit(double{});
    case ScalarType::Half:
      return visit(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return visit(torch::headeronly::BFloat16{});
    default:
      return visit(float{});
  }
}

}  // namespace orthoreg::cpu
