// Shared by elementwise kernels: tensors of any shape as rows that may have gaps between them.
#pragma once

#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

constexpr int kFlatThreads = 256;
constexpr int kFlatPieces = 2;  // of 8 columns, which a thread loads before it works on any

// A block takes as much of a row as its threads and their pieces cover, or several short rows. It
// goes on with later rows where the grid can not have a block for each.
inline LaunchConfig flat_config(int64_t rows, int64_t F) {
  const int64_t pieces = ceil_div(ceil_div(F, 8), kFlatPieces);
  unsigned threads = 1;
  while (threads < kFlatThreads && threads < pieces) threads *= 2;
  const unsigned height = kFlatThreads / threads;
  const int64_t most = 65535, blocks = ceil_div(rows, height);
  return {dim3(static_cast<unsigned>(ceil_div(pieces, threads)),
               static_cast<unsigned>(blocks < most ? blocks : most)),
          dim3(threads, height)};
}

// f(row, column, count) for every row of this thread: the first columns of its pieces, and how many
// columns these have, 0 or less if none.
template <class F>
__device__ __forceinline__ void for_flat_rows(int64_t rows, int64_t width, F f) {
  int64_t column[kFlatPieces];
  int count[kFlatPieces];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFlatPieces * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kFlatPieces; ++j) {
    column[j] = 8 * (first + j * blockDim.x);
    count[j] = static_cast<int>(min(width - column[j], int64_t{8}));
  }
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;
       row += step) {
    f(row, column, count);
  }
}

// The pieces of a row that starts at element `start`; none of them is waited for.
__device__ __forceinline__ void load_flat(const Values& x, int64_t start,
                                          const int64_t (&column)[kFlatPieces],
                                          const int (&count)[kFlatPieces],
                                          Bits8 (&out)[kFlatPieces]) {
#pragma unroll
  for (int j = 0; j < kFlatPieces; ++j) out[j] = load_bits8(x, start + column[j], count[j]);
}

// 1 / (1 + exp(-x)) from exp(-x), to a few float32 roundings.
__device__ __forceinline__ float sigmoid_of(float exp_of_minus) {
  return reciprocal_approx(1.0f + exp_of_minus);
}

// exp(x): the rounding of the product costs x roundings of the result, which then is small, or lost
// beside 1.
__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(1.44269504f * x); }

}  // namespace lumina_kernels::cuda
