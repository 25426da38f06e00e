// Shared by the CPU and the CUDA code of gqa_attention: scores as exponents of 2.
#pragma once

#include <algorithm>
#include <cmath>

namespace lumina_kernels {

constexpr float kLog2E = 1.44269504f;

// The weight of a product s = q kᵀ is 2^((inner * s - top) * outer), top being the row's largest
// inner * s. The difference comes before the product with the scale: it is exact next to the
// largest score, where rounded scores would differ by more than exponents can.
struct SplitScale {
  float inner, outer;
};

// For scores that have the scale in them already.
constexpr SplitScale kUnscaled = {1.f, kLog2E};

// Splits log2(e) * scale into a power of 2 that takes half of its exponent and the sign, and the
// positive rest. Differences of any two products are then finite wherever the scores are.
inline SplitScale split_scale(double scale) {
  // A scale of 0 makes all scores equal. So does the smallest positive number, and it keeps -inf.
  const double size = std::clamp(std::abs(scale), 0x1p-149, 0x1p128);
  const double inner = std::exp2(std::floor(std::ilogb(size) / 2.0) - 1);
  return {static_cast<float>(std::copysign(inner, scale)),
          static_cast<float>(size / inner * 1.4426950408889634)};
}

}  // namespace lumina_kernels
