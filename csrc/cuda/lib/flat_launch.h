// Shared by the launchers of elementwise kernels.
#pragma once

#include "cuda/lib/flat.cuh"
#include "cuda/lib/launch.h"

namespace lumina_kernels::cuda {

// The number of rows and their length: a single row if no tensor has gaps.
inline std::tuple<int64_t, int64_t> flat_shape(std::initializer_list<Tensor> tensors) {
  const Tensor& first = *tensors.begin();
  const int64_t F = first.dim() == 0 ? 1 : first.size(first.dim() - 1);
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_contiguous()) return {first.numel() / F, F};
  }
  return {1, first.numel()};
}

// The tensor as (rows, F), copied only if rows are not at equal distances.
inline Tensor flat(const Tensor& tensor, int64_t rows, int64_t F) {
  const int64_t shape[] = {rows, F};
  return packed(torch::stable::reshape(tensor, {shape, 2}));
}

}  // namespace lumina_kernels::cuda
