// Shared by the launchers that rotate heads: their tensors as kernel arguments.
#pragma once

#include "cuda/lib/launch.h"
#include "cuda/lib/rope_table.cuh"

namespace lumina_kernels::cuda {

// The heads of a packed tensor (B, L, H, K), which the caller keeps alive until the launch.
inline HeadsView heads_of(const Tensor& x) {
  return {values_of(x), x.stride(0), x.stride(1), x.stride(2)};
}

inline HeadsView heads_of(const OptionalTensor& x) {
  return x ? heads_of(*x) : HeadsView{values_of(x), 0, 0, 0};
}

inline NumbersView numbers_of(const Tensor& x, const char* name) {
  const auto data = pointer_to<const unsigned char>(x);
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return {data, Number::kDouble};
    case ScalarType::Float:
      return {data, Number::kFloat};
    case ScalarType::Half:
      return {data, Number::kHalf};
    case ScalarType::BFloat16:
      return {data, Number::kBFloat16};
    case ScalarType::Long:
      return {data, Number::kInt64};
    case ScalarType::Int:
      return {data, Number::kInt32};
    case ScalarType::Short:
      return {data, Number::kInt16};
    case ScalarType::Char:
      return {data, Number::kInt8};
    case ScalarType::Byte:
      return {data, Number::kUInt8};
    default:
      STD_TORCH_CHECK(false, name,
                      " must be float16, bfloat16, float32, float64, uint8 or int8 to "
                      "int64");
      return {data, Number::kFloat};
  }
}

// Positions (L, 3) or (B, L, 3), frequencies (K / 2,) or (B, K / 2) and axes (K / 2,).
inline AnglesView angles_of(const Tensor& positions, const Tensor& inv_freq, const Tensor& axis) {
  const int64_t p = positions.dim(), f = inv_freq.dim();
  return {.positions = numbers_of(positions, "positions"),
          .inv_freq = numbers_of(inv_freq, "inv_freq"),
          .axis = numbers_of(axis, "axis"),
          .position_b = p == 2 ? 0 : positions.stride(0),
          .position_l = positions.stride(p - 2),
          .position_column = positions.stride(p - 1),
          .freq_b = f == 1 ? 0 : inv_freq.stride(0),
          .freq_pair = inv_freq.stride(f - 1),
          .axis_pair = axis.stride(0)};
}

// A table (L, W), (B or 1, L, W) or (B or 1, L, H or 1, W).
inline TableView table_of(const Tensor& table) {
  const int64_t dim = table.dim();
  const auto step = [&](int64_t i) { return table.size(i) == 1 ? 0 : table.stride(i); };
  const bool is_double = table.scalar_type() == ScalarType::Double;
  return {.values = {.data = pointer_to<unsigned char>(table),
                     .dtype = is_double ? Dtype::kFloat : dtype_of(table),
                     .vectors = takes_vectors(table)},
          .is_double = is_double,
          .step_b = dim > 2 ? step(0) : 0,
          .step_l = step(dim > 2 ? 1 : 0),
          .step_h = dim > 3 ? step(2) : 0,
          .step = table.stride(dim - 1)};
}

inline bool has_heads(const Tensor& table) { return table.dim() == 4 && table.size(2) > 1; }

inline TablesView tables_of(const Tensor& cos, const Tensor& sin, const std::string& pairing,
                            int64_t channels, bool backward) {
  const bool half = pairing == "half";
  STD_TORCH_CHECK(half || pairing == "interleaved", "unknown pairing ", pairing);
  return {.cos = table_of(cos),
          .sin = table_of(sin),
          .channels = static_cast<int>(channels),
          .half = half,
          .backward = backward,
          .pairs = cos.size(cos.dim() - 1) < channels,
          .per_head = has_heads(cos) || has_heads(sin)};
}

// Kernels divide the indices of tokens in 32 bits.
inline void check_tokens(int64_t tokens) {
  STD_TORCH_CHECK(tokens < (int64_t{1} << 31), "batch times length must be less than 2^31, got ",
                  tokens);
}

}  // namespace lumina_kernels::cuda
