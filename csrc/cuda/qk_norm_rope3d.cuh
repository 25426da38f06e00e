// CUDA kernels of qk_norm_rope3d. In the forward a block has all heads of q and k of a token, in
// the backward those of q or k alone. The backward recomputes the statistics from the row, which it
// has to read anyway.
#pragma once

#include "cuda/lib/qk_norm_bwd.cuh"

namespace lumina_kernels::cuda {

struct QkNormRope3dFwdParams {
  HeadsView q, k, q_out, k_out;
  NormParameters parameters;
  AnglesView angles;
  NormShape shape;
  int64_t tokens, L;
};

// x -> rotate(norm(x) * weight + bias) for q and k, with the rotation of rope3d.
template <int N>
__global__ void __launch_bounds__(kFwdLimits.bound(N))
    qk_norm_rope3d_kernel(const QkNormRope3dFwdParams p) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  constexpr int T = fwd_tokens(N);
  const NormShared shared = norm_shared<T, N>(p.shape, memory);
  const RowPlace at = row_place(p.shape.layout);
  const FwdTokens<T> of = fwd_tokens_at<T>(p.shape.layout, at, p.tokens, p.L);
  Bits8 bits[T][N];
#pragma unroll
  for (int t = 0; t < T; ++t) {
    load_heads(bits[t], p.q, p.k, of.tokens[t], of.there[t], of.there[t], p.shape, at);
  }
  fill_rotations(p.angles, of.tokens, 1.0f, 0, p.shape.K, p.shape.layout, at, shared.rotations);
  Float8 x[T][N];
#pragma unroll
  for (int t = 0; t < T; ++t) convert_heads(bits[t], x[t], p.q, p.k, p.shape, at);
  norm_rotate(x, p.parameters, p.shape, at, shared);
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (of.there[t]) store_heads(x[t], p.q_out, p.k_out, of.tokens[t], p.shape, at);
  }
}

// dx of `chunk` tokens, and the sums of dweight and dbias over them (`norm_bwd`). With
// counts, a valid token gets its share of its window's gradient, others get nothing.
template <int N>
__global__ void __launch_bounds__(kBwdLimits.bound(N), N == 1 ? 2 : 1)
    qk_norm_rope3d_bwd_kernel(const QkNormBwdParams p) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  const NormShared shared = norm_shared<1, N>(p.shape, memory);
  const RowLayout& layout = p.shape.layout;
  const RowPlace at = row_place(layout);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.chunk;
  const int64_t end = min(first + p.chunk, p.tokens);
  Float8 dweight[N] = {}, dbias[N] = {};
  for (int64_t start = first; start < end; start += layout.slots) {
    const bool there = start + at.slot < end;
    const Token tokens[] = {token_of(there ? start + at.slot : end - 1, p.L)};
    const Token& token = tokens[0];
    const bool keep = there && p.windows.keeps(token.b, token.l);
    Float8 rows[1][N], d[N];
    Float8(&x)[N] = rows[0];
    load_heads(x, p.x, p.x, token, keep, false, p.shape, at);
    Token of_dout = token;
    if (p.counts != nullptr) of_dout.l = static_cast<uint32_t>(window_of(p.windows, token.l));
    load_heads(d, p.dout, p.dout, of_dout, keep, false, p.shape, at);
    if (p.counts != nullptr) {
      const float share = share_of(load_global<float>(p.counts + token.b * p.counts_b + of_dout.l));
#pragma unroll
      for (int n = 0; n < N; ++n) d[n] *= share;
    }
    fill_rotations(p.angles, tokens, -1.0f, 0, p.shape.K, layout, at, shared.rotations);
    float rstd[1][N];
    normalise<false>(rows, rstd, p.shape, at, shared);
    const PieceRotation rotation = load_rotation(shared.rotations, layout, at.slot, at.piece);
    norm_bwd(x, rstd[0], d, dweight, dbias, keep, p, at, shared,
             [&](int n) { rotate_piece(d[n], rotation); });
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t head = at.head + n * layout.step;
      x[n] = by_column([&](int i) { return keep ? x[n][i] : 0.0f; });  // it may be NaN
      store8(p.dx.values, p.dx.at(token.b, token.l, head) + 8 * at.piece,
             there ? channels(p.shape, at, n) : 0, x[n]);
    }
  }
  const int64_t partial = static_cast<int64_t>(blockIdx.x) * p.sums * p.width;
  if (p.sums > 0) store_sums(dweight, partial, p, at, memory);
  if (p.sums > 1) store_sums(dbias, partial + p.width, p, at, memory);
}

// --- the second stage of the parameters' gradients ---

constexpr int kSumColumns = 32, kSumRows = 16;

// Rows of `width` float32 values, `step` apart.
struct ParameterSum {
  Global<const float> partial;
  int64_t rows, step, width;
  Values out;  // null if the parameter is missing
};

struct ParameterSums {
  ParameterSum q_weight, q_bias, k_weight, k_bias;
};

inline LaunchConfig parameter_config(int64_t width) {
  return {dim3(static_cast<unsigned>(ceil_div(width, kSumColumns)), 4),
          dim3(kSumColumns, kSumRows)};
}

__device__ __forceinline__ void sum_rows(const ParameterSum& p) {
  LUMINA_SHARED(float, sums, kSumColumns* kSumRows);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  if (!is_there(p.out)) return;
  float total = 0.0f;
  if (column < p.width) {
    for (int64_t row = threadIdx.y; row < p.rows; row += kSumRows) {
      total += load_global<float>(p.partial + row * p.step + column);
    }
  }
  sums[threadIdx.y * kSumColumns + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || column >= p.width) return;
  for (int y = 1; y < kSumRows; ++y) total += sums[y * kSumColumns + threadIdx.x];
  store1(p.out, column, total);
}

// out = the sum of partial's rows, for the parameter that belongs to blockIdx.y.
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    qk_norm_rope3d_parameters_kernel(const ParameterSums p) {
  switch (blockIdx.y) {
    case 0:
      return sum_rows(p.q_weight);
    case 1:
      return sum_rows(p.q_bias);
    case 2:
      return sum_rows(p.k_weight);
    default:
      return sum_rows(p.k_bias);
  }
}

}  // namespace lumina_kernels::cuda
