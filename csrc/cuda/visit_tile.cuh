// From the tile size and the product of a launch to the types that kernels are made of.
#pragma once

#include "simt_tile.cuh"
#include "tensor_tile.cuh"

namespace orthoreg::cuda {

// Calls visit(Tile{}) with the TensorTile of that size.
template <Product kProduct, class Visit>
void visit_tensor_tile(int tile, const Visit& visit) {
  switch (tile) {
    case 32:
      return visit(TensorTile<32, kProduct>{});
    case 64:
      return visit(TensorTile<64, kProduct>{});
    default:
      return visit(TensorTile<128, kProduct>{});
  }
}

// Calls visit(Tile{}) for float.
template <class Visit>
void visit_tile(int tile, Product product, const Visit& visit) {
  switch (product) {
    case Product::kTf32x3:
      return visit_tensor_tile<Product::kTf32x3>(tile, visit);
    case Product::kTf32:
      return visit_tensor_tile<Product::kTf32>(tile, visit);
    case Product::kBf16:
      return visit_tensor_tile<Product::kBf16>(tile, visit);
    default:
      return visit(SimtTile<float>{});
  }
}

}  // namespace orthoreg::cuda
