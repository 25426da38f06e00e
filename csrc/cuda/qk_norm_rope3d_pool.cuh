// CUDA kernel of qk_norm_rope3d_pool: a block handles one window of tokens.
//
// It normalises and rotates all heads of q and k of each token, writes q, and sums k in registers,
// so that the unpooled k is never written. The backward is that of qk_norm_rope3d, in which k reads
// the gradient of its window, and for v that of context_drop.
#pragma once

#include "cuda/lib/qk_norm.cuh"
#include "cuda/lib/window.cuh"

namespace lumina_kernels::cuda {

constexpr NormLimits kPoolLimits{4, 256, 384, 0};

// Tokens of a window that a block has at a time.
__host__ __device__ constexpr int pool_tokens(int heads) { return heads < 4 ? 2 : 1; }

struct QkNormRope3dPoolParams {
  HeadsView q, k, v, q_out, k_out, v_out;
  NormParameters parameters;
  AnglesView angles;
  NormShape shape;  // a block has one slot
  Global<unsigned char> mask_out;
  Global<float> counts;
  MaskedWindows windows;
};

// rotate(norm(q)) for the tokens of a window; the means of rotate(norm(k)) and of v over its valid
// tokens, 0 if there are none; and their number.
template <int N>
__global__ void __launch_bounds__(kPoolLimits.bound(N), N < 4 ? 2 : 1)
    qk_norm_rope3d_pool_kernel(const QkNormRope3dPoolParams p) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  constexpr int T = pool_tokens(N);
  const NormShared shared = norm_shared<T, N>(p.shape, memory);
  const RowLayout& layout = p.shape.layout;
  const RowPlace place = row_place(layout);
  const Window window = window_at(p.windows, blockIdx.x);
  const int all = window.height * window.width;
  Float8 sums[N] = {};  // of k; unused for heads of q
  float count = 0.0f;
  for (int first = 0; first < all; first += T) {
    // Otherwise the compiler keeps the addresses of six tensors in registers.
    const RowPlace at{0, place.thread, opaque(place.piece), opaque(place.head)};
    const uint32_t b = static_cast<uint32_t>(opaque(static_cast<int>(window.b)));
    Token tokens[T];
    bool there[T], keep[T];
    Bits8 bits[T][N];
#pragma unroll
    for (int t = 0; t < T; ++t) {
      there[t] = first + t < all;
      const int i = there[t] ? first + t : first, y = i / window.width, x = i - y * window.width;
      tokens[t] = {b, static_cast<uint32_t>(window.first) + y * p.windows.grid_w + x};
      keep[t] = there[t] && p.windows.keeps(b, tokens[t].l);
      load_heads(bits[t], p.q, p.k, tokens[t], there[t], keep[t], p.shape, at);
    }
    if (first > 0) __syncthreads();  // the previous tokens' means have been read
    fill_rotations(p.angles, tokens, 1.0f, 0, p.shape.K, layout, at, shared.rotations);
    Float8 x[T][N];
#pragma unroll
    for (int t = 0; t < T; ++t) convert_heads(bits[t], x[t], p.q, p.k, p.shape, at);
    norm_rotate(x, p.parameters, p.shape, at, shared);
#pragma unroll
    for (int t = 0; t < T; ++t) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int head = at.head + n * layout.step;
        if (head >= p.shape.H) {
          if (keep[t]) sums[n] += x[t][n];
        } else if (there[t]) {
          store8(p.q_out.values, p.q_out.at(b, tokens[t].l, head) + 8 * at.piece,
                 channels(p.shape, at, n), x[t][n]);
        }
      }
      count += keep[t] ? 1.0f : 0.0f;
    }
  }
  const float share = share_of(count);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int head = place.head + n * layout.step - p.shape.H;
    if (head < 0) continue;
    store8(p.k_out.values, p.k_out.at(window.b, window.number, head) + 8 * place.piece,
           channels(p.shape, place, n), sums[n] * share);
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
