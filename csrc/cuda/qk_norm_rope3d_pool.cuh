// CUDA kernel of qk_norm_rope3d_pool: a block has one window of tokens.
//
// It normalises and turns all heads of q and k of each of them, writes q, and keeps k as sums in
// registers, so that the whole k is never written. The backward is that of qk_norm_rope3d, where k
// reads the gradient of its window, and of context_drop for v.
#pragma once

#include "cuda/lib/qk_norm.cuh"
#include "cuda/lib/window.cuh"

namespace lumina_kernels::cuda {

constexpr NormLimits kPoolLimits{4, 256, 384, 0};

struct QkNormRope3dPoolParams {
  HeadsView q, k, v, q_out, k_out, v_out;
  NormParameters parameters;
  AnglesView angles;
  NormShape shape;  // a block has one slot
  Global<unsigned char> mask_out;
  Global<float> counts;
  MaskedWindows windows;
};

// turn(norm(q)) for the tokens of a window; over the valid ones the means of turn(norm(k)) and of
// v, 0 where there is none; their number
template <int N>
__global__ void __launch_bounds__(kPoolLimits.bound(N), N < 4 ? 2 : 1)
    qk_norm_rope3d_pool_kernel(const QkNormRope3dPoolParams p) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  const NormShared shared = norm_shared<N>(p.shape, memory);
  const RowLayout& layout = p.shape.layout;
  const RowPlace at = row_place(layout);
  const Window window = window_at(p.windows, blockIdx.x);
  Float8 sums[N] = {};  // of k; unused for heads of q
  float count = 0.0f;
  for (int i = 0; i < window.height * window.width; ++i) {
    const int y = i / window.width;
    const int64_t l = window.first + static_cast<int64_t>(y) * p.windows.grid_w + i -
                      static_cast<int64_t>(y) * window.width;
    const Token token{0, window.b, l};
    const bool keep = p.windows.keeps(window.b, l);
    Float8 x[N];
    load_heads(x, p.q, p.k, token, true, keep, p.shape, at);
    if (i > 0) __syncthreads();  // what the last token's means wrote and read
    fill_rotations(p.angles, token, 1.0f, 0, p.shape.K, layout, at, shared.rotations);
    norm_rotate(x, p.parameters, p.shape, at, shared);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int head = at.head + n * layout.step;
      if (head < p.shape.H) {
        store8(p.q_out.values, p.q_out.at(window.b, l, head) + 8 * at.piece,
               channels(p.shape, at, n), x[n]);
      } else if (keep) {
        sums[n] += x[n];
      }
    }
    count += keep ? 1.0f : 0.0f;
  }
  const float share = share_of(count);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int head = at.head + n * layout.step - p.shape.H;
    if (head < 0) continue;
    store8(p.k_out.values, p.k_out.at(window.b, window.number, head) + 8 * at.piece,
           channels(p.shape, at, n), sums[n] * share);
  }
  for (int i = static_cast<int>(threadIdx.x); i < p.shape.G * layout.pieces; i += layout.threads) {
    const int head = i / layout.pieces, column = 8 * (i - head * layout.pieces);
    const int left = p.shape.K - column;
    store8(p.v_out.values, p.v_out.at(window.b, window.number, head) + column, left,
           window_mean(p.v, head, column, left, p.windows, window));
  }
  if (threadIdx.x == 0) {
    p.mask_out[blockIdx.x] = count > 0.0f;
    p.counts[blockIdx.x] = count;
  }
}

}  // namespace lumina_kernels::cuda
