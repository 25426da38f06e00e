// Shared by the backwards of kernels that normalise queries and keys. A block has the heads of q or
// of k of some tokens, one after another; the statistics are computed again from the row, which has
// to be read anyway.
#pragma once

#include "cuda/lib/qk_norm.cuh"
#include "cuda/lib/window.cuh"

namespace lumina_kernels::cuda {

constexpr NormLimits kFwdLimits{4, 256, 512, 128}, kBwdLimits{2, 320, 512, 256};

struct QkNormBwdParams {
  HeadsView dout, x, dx;
  Values weight, partial;  // partial sums (blocks, sums, width), float32
  AnglesView angles;
  NormShape shape;  // of one tensor: G is 0
  int sums;         // 0 for no parameter, 1 for a weight alone, 2 for weight and bias
  int64_t width;    // of a parameter
  int64_t tokens, L, chunk;
  MaskedWindows windows;       // if dout is the gradient of means over windows,
  Global<const float> counts;  // their numbers of valid tokens (B, windows); otherwise null
  int64_t counts_b;
};

// The gradient of a row, and its contribution to those of weight and bias.
//
// With n the normalised row, which x holds, d the gradient rotated back and g = d * weight, dweight
// = d * n, dbias = d and dx = rstd * (g - mean(g) - n * mean(g * n)), without mean(g) for an RMS
// norm. x becomes dx; rotate_back(i) rotates d[i].
template <int N, class F>
__device__ __forceinline__ void norm_bwd(Float8 (&x)[N], const float (&rstd)[N], Float8 (&d)[N],
                                         Float8 (&dweight)[N], Float8 (&dbias)[N], bool keep,
                                         const QkNormBwdParams& p, const RowPlace& at,
                                         const NormShared& shared, F rotate_back) {
  float sums[2][N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    rotate_back(n);
    // x may be NaN where everything is masked
    dweight[n] += by_column([&](int i) { return keep ? d[n][i] * x[n][i] : 0.0f; });
    dbias[n] += d[n];
    if (is_there(p.weight)) {
      d[n] *= load8(p.weight, parameter_at(p.shape, at, at.head + n * p.shape.layout.step),
                    channels(p.shape, at, n));
    }
    sums[0][n] = sum_of_products(d[n], x[n]);
    sums[1][n] = 0.0f;
    add_columns(sums[1][n], d[n]);
  }
  if (p.shape.norm == NormKind::kRmsPerHead) {
    float of_products[1][N];
#pragma unroll
    for (int n = 0; n < N; ++n) of_products[0][n] = sums[0][n];
    means_per_head(of_products, p.shape, at, shared.scratch[2]);
#pragma unroll
    for (int n = 0; n < N; ++n) sums[0][n] = of_products[0][n];
  } else {
    means_across_heads<false>(sums, p.shape, at, shared.scratch[2]);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float shift = p.shape.norm == NormKind::kLayerAcrossHeads ? sums[1][n] : 0.0f;
    x[n] = rstd[n] * (d[n] - shift - x[n] * sums[0][n]);
  }
}

// Shares 8 values with the other threads of the block, after they have read the previous ones.
__device__ __forceinline__ void share_sums(const Float8& sums, Shared<float> mine) {
  __syncthreads();
  store_shared(mine, make_float4(sums[0], sums[1], sums[2], sums[3]));
  store_shared(mine + 4, make_float4(sums[4], sums[5], sums[6], sums[7]));
  __syncthreads();
}

// Adds the sums of all slots of a block, and of all heads if these share a parameter, and writes
// them to p.partial from value `first` on.
template <int N>
__device__ __forceinline__ void store_sums(Float8 (&sums)[N], int64_t first,
                                           const QkNormBwdParams& p, const RowPlace& at,
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

}  // namespace lumina_kernels::cuda
