// How the CUDA kernels multiply float32: one product for Gram matrices, one for gradients.
#pragma once

#include <string>

namespace orthoreg {

enum class Product : int {
  kSimt,    // fused multiply-adds in the computing precision, the only one for float64
  kTf32x3,  // three TF32 products of both operands' parts: as good as float32
  kTf32,
  kBf16,
};

struct Precision {
  Product gram, gradient;
};

// The rows of orthoreg_ext/precision.py, by name; false if there is none of that name.
inline bool parse_precision(const std::string& name, Precision* out) {
  struct Row {
    const char* name;
    Precision precision;
  };
  constexpr Row kRows[] = {{"ieee", {Product::kSimt, Product::kSimt}},
                           {"3xtf32", {Product::kTf32x3, Product::kTf32x3}},
                           {"mixed", {Product::kTf32x3, Product::kTf32}},
                           {"mixed-bf16", {Product::kTf32x3, Product::kBf16}},
                           {"tf32", {Product::kTf32, Product::kTf32}},
                           {"bf16", {Product::kBf16, Product::kBf16}}};
  for (const Row& row : kRows) {
    if (name == row.name) return *out = row.precision, true;
  }
  return false;
}

}  // namespace orthoreg
