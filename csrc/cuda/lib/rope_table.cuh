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

// An entry in two steps, as Bits8 are of 8 columns: the loads of several do not wait for each
// other.
__device__ __forceinline__ uint64_t load_entry_bits(const TableView& table, int64_t i) {
  const Global<unsigned char> data = table.values.data;
  if (table.is_double) return load_global<unsigned long long>(data + 8 * i);
  if (table.values.dtype == Dtype::kFloat) return load_global<unsigned>(data + 4 * i);
  return load_global<unsigned short>(data + 2 * i);
}

__device__ __forceinline__ float entry_of(uint64_t bits, const TableView& table) {
  if (table.is_double) {
    double value;
    memcpy(&value, &bits, sizeof(value));
    return static_cast<float>(value);
  }
  if (table.values.dtype == Dtype::kFloat) return __uint_as_float(static_cast<uint32_t>(bits));
  const uint16_t half = static_cast<uint16_t>(bits);
  return table.values.dtype == Dtype::kHalf ? half_to_float(half) : bfloat16_to_float(half);
}

__device__ __forceinline__ float load_entry(const TableView& table, int64_t i) {
  return entry_of(load_entry_bits(table, i), table);
}

}  // namespace lumina_kernels::cuda
