// Shared by the launchers of kernels over rows: which kind of rows these are, and their chunks.
#pragma once

#include "cuda/lib/launch.h"
#include "cuda/lib/rows_bwd.cuh"

namespace lumina_kernels::cuda {

// From the tensors with a row per token, (B, L, D), the parameters and the outputs.
inline RowKind row_kind(int64_t D, std::initializer_list<RowsView> rows,
                        std::initializer_list<RowsView> parameters,
                        std::initializer_list<Values> outputs) {
  const Dtype dtype = rows.begin()->values.dtype;
  const auto is_plain = [&](const Values& x) {
    return x.data == nullptr || (x.dtype == dtype && x.vectors);
  };
  bool plain = D <= 8 * kRowThreads && D % 8 == 0 && dtype != Dtype::kFloat;
  for (const RowsView& x : rows) plain &= is_plain(x.values) && x.step_l < int64_t{1} << 31;
  for (const RowsView& x : parameters) plain &= is_plain(x.values) && !x.per_token;
  for (const Values& x : outputs) plain &= is_plain(x);
  if (plain) return RowKind::kPlain;
  return D <= 8 * kPieces<RowKind::kWhole> * kWholeThreads ? RowKind::kWhole : RowKind::kWide;
}

// f<kKind>() for the kind.
template <class F>
auto with_kind(RowKind kind, F f) {
  switch (kind) {
    case RowKind::kPlain:
      return f.template operator()<RowKind::kPlain>();
    case RowKind::kWhole:
      return f.template operator()<RowKind::kWhole>();
    default:
      return f.template operator()<RowKind::kWide>();
  }
}

// For a forward kernel that works on `rows` plain rows at once.
template <RowKind kKind>
LaunchConfig forward_config(int64_t B, int64_t L, int64_t D, int rows) {
  return row_config(B * ceil_div(L, kPlain<kKind> ? rows : 1), D, kPieces<kKind>);
}

// For a backward kernel: a chunk for each of the blocks that run at once, so that all of them end
// together, or where samples are too many for that, several shorter ones; at least 4 rows, so that
// partial sums are a small part of the traffic.
template <RowKind kKind, class Kernel>
RowChunks row_chunks(const Tensor& like, Kernel kernel, int64_t B, int64_t L, int64_t D) {
  const dim3 block = row_block(D, kPieces<kKind>);
  const int64_t slots = blocks_at_once(like, kernel, block) * block.y;
  int64_t chunks = slots / B;
  if (20 * B * chunks < 17 * slots) chunks = 4 * slots / B;
  const int64_t rows = chunks > 1 ? ceil_div(L, chunks) : L;
  return {B, L, rows < 4 ? 4 : rows + rows % 2, static_cast<int>(D)};
}

}  // namespace lumina_kernels::cuda
