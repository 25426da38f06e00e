// Shared by all CPU kernels: rows of tensors of any dtype, threads, the choice of level.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor.h"

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define LUMINA_X86
#include <immintrin.h>
#endif
#define LUMINA_STRING(...) #__VA_ARGS__
#define LUMINA_INLINE inline __attribute__((always_inline))

namespace lumina_kernels::cpu {

// Levels in rising order. level() is the best that this processor has, unless another was forced.
enum Level { kPortable, kAvx2, kAvx512, kAvx512Bf16 };
Level level();

#ifdef LUMINA_X86
#define LUMINA_CALL(kernel, ...)                            \
  (level() == kAvx512Bf16 ? avx512bf16::kernel(__VA_ARGS__) \
   : level() == kAvx512   ? avx512::kernel(__VA_ARGS__)     \
   : level() == kAvx2     ? avx2::kernel(__VA_ARGS__)       \
                          : portable::kernel(__VA_ARGS__))
#else
#define LUMINA_CALL(kernel, ...) portable::kernel(__VA_ARGS__)
#endif

// Contiguous values of one dtype; null if an optional tensor is missing.
struct Row {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat;

  explicit operator bool() const { return data != nullptr; }
  Row operator+(int64_t offset) const {
    return {data ? data + offset * size_of(dtype) : nullptr, dtype};
  }
};

// Rows of a tensor (B, L, ..., D) read in place: row(b, l), or row(b, l, h) of heads.
struct Rows {
  Tensor owner;  // the tensor itself, or a copy if its last dimension has gaps
  Row base;
  int64_t b = 0, l = 0, h = 0;  // steps in elements

  explicit operator bool() const { return bool(base); }
  Row operator()(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return base + (i * b + j * l + k * h);
  }
};

inline Row row_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), dtype_of(tensor)};
}

// (D,) is one row for all, (B, D) one for each sample, (B, L, D) one for each token, (B, L, H, K)
// one for each head.
inline Rows rows_of(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  Rows rows{is_packed(tensor) ? tensor : torch::stable::contiguous(tensor)};
  rows.base = row_of(rows.owner);
  if (dim > 1) rows.b = rows.owner.stride(0);
  if (dim > 2) rows.l = rows.owner.stride(1);
  if (dim > 3) rows.h = rows.owner.stride(2);
  return rows;
}

inline Rows rows_of(const OptionalTensor& tensor) { return tensor ? rows_of(*tensor) : Rows{}; }

// The number of rows and their length, for elementwise ops, which take any shape: a single row if
// no tensor has gaps.
inline std::tuple<int64_t, int64_t> flat_shape(std::initializer_list<Tensor> tensors) {
  const Tensor& first = *tensors.begin();
  const int64_t last = first.dim() == 0 ? 1 : first.size(first.dim() - 1);
  for (const Tensor& tensor : tensors)
    if (!tensor.is_contiguous()) return {last == 0 ? 0 : first.numel() / last, last};
  return {1, first.numel()};
}

// The tensor as that many rows, copied only if these are not at equal distances.
inline Rows flat_rows(const Tensor& tensor, int64_t rows) {
  if (tensor.numel() == 0) return Rows{tensor};
  if (tensor.is_contiguous())  // without torch's view, which takes microseconds
    return Rows{.owner = tensor, .base = row_of(tensor), .b = tensor.numel() / rows};
  const int64_t shape[] = {rows, tensor.numel() / rows};
  return rows_of(torch::stable::reshape(tensor, {shape, 2}));
}

// Calls f(i) for i in [0, count) from several threads; each call handles about `work` values.
template <class F>
void parallel_rows(int64_t count, int64_t work, const F& f) {
  constexpr int64_t kValuesPerTask = 16384;  // less is finished before another thread wakes up
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(work, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Calls f(row, first, count) for pieces of rows of `length` values.
template <class F>
void parallel_pieces(int64_t rows, int64_t length, const F& f) {
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = ceil_div(length, kPiece);
  parallel_rows(rows * pieces, std::min(length, kPiece), [&](int64_t i) {
    const int64_t first = i % pieces * kPiece;
    f(i / pieces, first, std::min(kPiece, length - first));
  });
}

}  // namespace lumina_kernels::cpu
