// CUDA kernels of qk_norm_rope3d. The forward has all heads of q and k of a token in a block, the
// backward those of one of them. The statistics of a row cost no bytes, so the backward computes
// them again from the row it has to read anyway.
#pragma once

#include "cuda/lib/qk_norm.cuh"
#include "cuda/lib/window.cuh"

namespace lumina_kernels::cuda {

constexpr NormLimits kFwdLimits{4, 256, 512, 128}, kBwdLimits{2, 320, 512, 256};

struct QkNormRope3dFwdParams {
  HeadsView q, k, q_out, k_out;
  NormParameters parameters;
  AnglesView angles;
  NormShape shape;
  int64_t tokens, L;
};

// x -> turn(norm(x) * weight + bias) for q and k, the turn as in rope3d
template <int N>
__global__ void __launch_bounds__(kFwdLimits.bound(N))
    qk_norm_rope3d_kernel(const QkNormRope3dFwdParams p) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  const NormShared shared = norm_shared<N>(p.shape, memory);
  const RowLayout& layout = p.shape.layout;
  const RowPlace at = row_place(layout);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * layout.slots + at.slot;
  const bool there = number < p.tokens;
  const Token token = token_of(there ? number : p.tokens - 1, p.L);
  Float8 x[N];
  load_heads(x, p.q, p.k, token, there, there, p.shape, at);
  fill_rotations(p.angles, token, 1.0f, 0, p.shape.K, layout, at, shared.rotations);
  norm_rotate(x, p.parameters, p.shape, at, shared);
  if (!there) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int head = at.head + n * layout.step;
    const bool of_q = head < p.shape.H;
    const HeadsView to = select(of_q, p.q_out, p.k_out);
    const int64_t start = to.at(token.b, token.l, of_q ? head : head - p.shape.H);
    store8(to.values, start + 8 * at.piece, channels(p.shape, at, n), x[n]);
  }
}

struct QkNormRope3dBwdParams {
  HeadsView dout, x, dx;
  Values weight, partial;  // partial sums (blocks, sums, width), float32
  AnglesView angles;
  NormShape shape;  // of one tensor: G is 0
  int sums;         // 0 for no parameter, 1 for a weight alone, 2 for weight and bias
  int64_t width;    // of a parameter
  int64_t tokens, L, chunk;
  MaskedWindows windows;       // where dout is that of means over windows,
  Global<const float> counts;  // their (B, windows) valid tokens, else null
  int64_t counts_b;
};

// Gradients of a row, and what it adds to those of weight and bias.
//
// With n the normalised row, d the gradient turned back and g = d * weight: dweight = d * n,
// dbias = d, dx = rstd * (g - mean(g) - n * mean(g * n)), without mean(g) for an RMS norm. x
// becomes n and then dx; d is turned back by shared.turns, whose sines are negative.
template <int N>
__device__ __forceinline__ void norm_rotate_bwd(Float8 (&x)[N], Float8 (&d)[N],
                                                Float8 (&dweight)[N], Float8 (&dbias)[N], bool keep,
                                                const QkNormRope3dBwdParams& p, const RowPlace& at,
                                                const NormShared& shared) {
  float rstd[N], sums[2][N];
  normalise(x, rstd, p.shape, at, shared);
  const PieceRotation rotation = load_rotation(shared.rotations, p.shape.layout, at);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    rotate_piece(d[n], rotation);
    // x may be NaN where everything is masked
    dweight[n] += by_column([&](int i) { return keep ? d[n][i] * x[n][i] : 0.0f; });
    dbias[n] += d[n];
    if (is_there(p.weight)) {
      d[n] *= load_parameter(p.weight, p.shape, at, at.head + n * p.shape.layout.step,
                             channels(p.shape, at, n));
    }
    sums[0][n] = sum_of_products(d[n], x[n]);
    sums[1][n] = 0.0f;
    add_columns(sums[1][n], d[n]);
  }
  if (p.shape.norm == NormKind::kRmsPerHead) {
    means_per_head(sums[0], p.shape, at, shared.scratch[2]);
  } else {
    means_across_heads(sums, p.shape, at, shared.scratch[2]);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float shift = p.shape.norm == NormKind::kLayerAcrossHeads ? sums[1][n] : 0.0f;
    x[n] = rstd[n] * (d[n] - shift - x[n] * sums[0][n]);
  }
}

// Gives 8 values to the other threads of the block, after what was there has been read.
__device__ __forceinline__ void share_sums(const Float8& sums, Shared<float> mine) {
  __syncthreads();
  store_shared(mine, make_float4(sums[0], sums[1], sums[2], sums[3]));
  store_shared(mine + 4, make_float4(sums[4], sums[5], sums[6], sums[7]));
  __syncthreads();
}

// Adds the sums of all slots of a block, and of all heads where they share a parameter, and writes
// them from value `first` of p.partial on.
template <int N>
__device__ __forceinline__ void store_sums(Float8 (&sums)[N], int64_t first,
                                           const QkNormRope3dBwdParams& p, const RowPlace& at,
                                           Shared<float> shared) {
  const RowLayout& layout = p.shape.layout;
  const Shared<float> mine = shared + 8 * threadIdx.x;
  if (p.shape.norm == NormKind::kRmsPerHead) {
#pragma unroll
    for (int n = 1; n < N; ++n) sums[0] += sums[n];
    share_sums(sums[0], mine);
    for (int column = threadIdx.x; column < p.shape.K; column += blockDim.x) {
      float total = 0.0f;
      for (int slot = 0; slot < layout.slots; ++slot) {
        for (int row = 0; row < layout.step; ++row) {
          total += shared[8 * (slot * layout.threads + row * layout.pieces) + column];
        }
      }
      store1(p.partial, first + column, total);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    share_sums(sums[n], mine);
    if (at.slot > 0) continue;
    for (int slot = 1; slot < layout.slots; ++slot) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[n][i] += mine[8 * slot * layout.threads + i];
    }
    const int64_t head = at.head + n * layout.step;
    store8(p.partial, first + head * p.shape.K + 8 * at.piece, channels(p.shape, at, n), sums[n]);
  }
}

// dx of `chunk` tokens by `norm_rotate_bwd`, and the sums of its dweight and dbias over them. With
// counts a valid token has its share in the gradient of its window, others have none.
template <int N>
__global__ void __launch_bounds__(kBwdLimits.bound(N), N == 1 ? 2 : 1)
    qk_norm_rope3d_bwd_kernel(const QkNormRope3dBwdParams p) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  const NormShared shared = norm_shared<N>(p.shape, memory);
  const RowLayout& layout = p.shape.layout;
  const RowPlace at = row_place(layout);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.chunk;
  const int64_t end = min(first + p.chunk, p.tokens);
  Float8 dweight[N] = {}, dbias[N] = {};
  for (int64_t start = first; start < end; start += layout.slots) {
    const bool there = start + at.slot < end;
    const Token token = token_of(there ? start + at.slot : end - 1, p.L);
    const bool keep = there && p.windows.keeps(token.b, token.l);
    Float8 x[N], d[N];
    load_heads(x, p.x, p.x, token, keep, false, p.shape, at);
    Token of_dout = token;
    if (p.counts != nullptr) of_dout.l = window_of(p.windows, token.l);
    load_heads(d, p.dout, p.dout, of_dout, keep, false, p.shape, at);
    if (p.counts != nullptr) {
      const float share = share_of(load_global<float>(p.counts + token.b * p.counts_b + of_dout.l));
#pragma unroll
      for (int n = 0; n < N; ++n) d[n] *= share;
    }
    fill_rotations(p.angles, token, -1.0f, 0, p.shape.K, layout, at, shared.rotations);
    norm_rotate_bwd(x, d, dweight, dbias, keep, p, at, shared);
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
  Values out;  // null where the parameter is
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

// out = the sum of partial's rows, for the parameter of this blockIdx.y
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
