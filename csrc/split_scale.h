// Shared by the CPU and the CUDA code of gqa_attention: scores as exponents of 2, and log-sum-exps.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace lumina_kernels {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// The natural log-sum-exp of a row without a valid key (LSE_FLOOR in Python).
constexpr float kLseFloor = -2000.f;

// The weight of a product s = q kᵀ is 2^((inner * s - top) * outer), top being the row's largest
// inner * s. The difference comes before the product with the scale: it is exact next to the
// largest score, where rounded scores would differ by more than exponents can.
struct SplitScale {
  float inner, outer;
};

// For scores that have the scale in them already.
constexpr SplitScale kUnscaled = {1.f, kLog2E};

// log2(e) * scale as the product of a power of 2, with the sign and about half of the exponent, and
// a positive number. Neither a product nor the difference of two of opposite signs is then infinite
// where the scores are not: for that the power of 2 is half as large as it might be. `inner` is
// negative exactly if the scale is below 0 as a float: kernels decide by either.
inline SplitScale split_scale(double scale) {
  if (!(std::abs(scale) <= std::numeric_limits<float>::max())) return {NAN, NAN};
  // A scale of 0 makes all scores equal. So does a number this small, and it keeps -inf.
  const double size = std::max(std::abs(scale), 0x1p-149);
  const double inner = std::exp2(std::floor(std::ilogb(size) / 2.0) - 1);
  const bool negative = static_cast<float>(scale) < 0.0f;  // and not -0, nor what rounds to it
  return {static_cast<float>(negative ? -inner : inner),
          static_cast<float>(size / inner * 1.4426950408889634)};
}

}  // namespace lumina_kernels
