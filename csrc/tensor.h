// Shared by the CPU and the CUDA code: torch's tensors through its stable ABI, their dtypes, and
// new tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dtype.h"

namespace lumina_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
      return Dtype::kFloat;
  }
}

// The last dimension has no gaps.
inline bool is_packed(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

// A row for each token, (B, L, D), rather than for each sample, (B, D).
inline bool is_per_token(const OptionalTensor& tensor) { return tensor && tensor->dim() == 3; }

// --- new tensors: contiguous, on like's device ---

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

inline Tensor empty_as(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }
inline Tensor zeros_as(const Tensor& like) { return torch::stable::new_zeros(like, like.sizes()); }

// An absent result, since an op cannot return None; always float32.
inline Tensor nothing(const Tensor& like) { return empty(like, {0}, ScalarType::Float); }

// The gradient of an optional input: `nothing` where the input is missing.
inline Tensor empty_as(const OptionalTensor& x, const Tensor& like) {
  return x ? empty_as(*x) : nothing(like);
}
inline Tensor zeros_as(const OptionalTensor& x, const Tensor& like) {
  return x ? zeros_as(*x) : nothing(like);
}

// Keys, or heads that are none where there are no keys, (B, L, 0, K).
inline Tensor or_no_heads(const OptionalTensor& k, const Tensor& q) {
  return k ? *k : empty(q, {q.size(0), q.size(1), 0, q.size(3)}, q.scalar_type());
}

// The sum over the axes along which `like` is broadcast to the shape of `whole`, as its gradient.
inline Tensor sum_to(const Tensor& whole, const Tensor& like) {
  std::vector<int64_t> axes;
  const int64_t missing = whole.dim() - like.dim();
  for (int64_t i = 0; i < whole.dim(); ++i)
    if (i < missing || like.size(i - missing) != whole.size(i)) axes.push_back(i);
  const Tensor grad = axes.empty() ? whole : torch::stable::sum(whole, axes, true);
  return torch::stable::to(torch::stable::reshape(grad, like.sizes()), like.scalar_type());
}

}  // namespace lumina_kernels
