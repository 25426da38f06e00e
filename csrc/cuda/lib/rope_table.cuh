// Shared by the kernels that rotate heads by tables: cosines and sines, read where they lie.
#pragma once

#include "cuda/lib/rope.cuh"

namespace lumina_kernels::cuda {

// Cosines or sines, read in place: entry i of head h of token l of sample b is element
// b * step_b + l * step_l + h * step_h + i * step. The steps of what is shared are 0.
struct TableView {
  Values values;
  bool is_double;  // values.dtype does not count then
  int64_t step_b, step_l, step_h, step;

  __device__ __forceinline__ int64_t row(const Token& token, int64_t h) const {
    return token.b * step_b + token.l * step_l + h * step_h;
  }
};

// The rotation of the first `channels` channels of every head; backward, that of the gradient.
struct TablesView {
  TableView cos, sin;
  int channels;
  bool half, backward;
  bool pairs;     // the tables have an entry for each pair rather than for each channel
  bool per_head;  // and rows for each head
};

__device__ __forceinline__ float load_entry(const TableView& table, int64_t i) {
  if (!table.is_double) return load1(table.values, i);
  return static_cast<float>(load_global<double>(table.values.data + 8 * i));
}

}  // namespace lumina_kernels::cuda
