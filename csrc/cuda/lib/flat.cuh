// Shared by elementwise kernels: tensors of any shape as rows that may have gaps between them.
#pragma once

#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

constexpr int kFlatThreads = 256;

// A thread takes 8 columns of one of `rows` rows of F values.
inline LaunchConfig flat_config(int64_t rows, int64_t F) {
  const int64_t blocks = ceil_div(rows * ceil_div(F, 8), kFlatThreads);
  return {dim3(static_cast<unsigned>(blocks)), dim3(kFlatThreads)};
}

// The row and first column of this thread; row >= rows if it has nothing to do.
__device__ __forceinline__ void flat_place(int64_t rows, int64_t F, int64_t& row, int64_t& column) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  const int64_t pieces = ceil_div(F, 8);
  row = rows == 1 ? (i < pieces ? 0 : 1) : divide(i, pieces);
  column = (i - row * pieces) * 8;
}

}  // namespace lumina_kernels::cuda
