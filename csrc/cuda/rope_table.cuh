// CUDA kernel of rope_table: a block rotates all heads of q and k of some tokens.
#pragma once

#include "cuda/lib/rope.cuh"

namespace lumina_kernels::cuda {

constexpr int kRopeTableThreads = 256;

// A thread has 8 neighbouring channels if the two of a pair are neighbours. With `half` these are
// K/2 apart, and a thread has 4 channels and their partners. Both are aligned to 4 values if 8
// divides K, and `vectors` of q, k and the tables then refers to 4 values.
struct RopeTableParams {
  HeadsView q, k, q_out, k_out;
  RowsView cos, sin;
  RowLayout layout;
  int64_t tokens, L;
  int H, G, K;
  bool half, backward;
};

inline int64_t rope_table_pieces(int64_t K, bool half) {
  return half ? ceil_div(K / 2, 4) : ceil_div(K, 8);
}

inline LaunchConfig rope_table_config(const RowLayout& layout, int64_t tokens, int64_t pieces) {
  return token_config(layout, tokens, pieces, 0);
}

// 4 values; only the first `count` exist.
__device__ __forceinline__ void load4(const Values& x, int64_t i, int count, float* out) {
  if (!x.vectors || count < 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = k < count ? load1(x, i + k) : 0.0f;
  } else if (x.dtype == Dtype::kFloat) {
    const float4 values = load_global<float4>(x.data + 4 * i);
    out[0] = values.x, out[1] = values.y, out[2] = values.z, out[3] = values.w;
  } else {
    const uint2 bits = load_global<uint2>(x.data + 2 * i);
    unpack2(bits.x, x.dtype, out[0], out[1]);
    unpack2(bits.y, x.dtype, out[2], out[3]);
  }
}

__device__ __forceinline__ void store4(const Values& x, int64_t i, int count, const float* in) {
  if (!x.vectors || count < 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < count) store1(x, i + k, in[k]);
    }
  } else if (x.dtype == Dtype::kFloat) {
    store_global(x.data + 4 * i, make_float4(in[0], in[1], in[2], in[3]));
  } else {
    store_global(x.data + 2 * i,
                 make_uint2(pack2(in[0], in[1], x.dtype), pack2(in[2], in[3], x.dtype)));
  }
}

// Piece `piece` of the K values from element i on.
__device__ __forceinline__ Float8 load_piece(const Values& x, int64_t i, int piece, int K,
                                             bool half) {
  if (!half) return load8(x, i + 8 * piece, K - 8 * piece);
  Float8 out;
  const int column = 4 * piece, count = K / 2 - column;
  load4(x, i + column, count, out.columns);
  load4(x, i + K / 2 + column, count, out.columns + 4);
  return out;
}

__device__ __forceinline__ void store_piece(const Values& x, int64_t i, int piece, int K, bool half,
                                            const Float8& in) {
  if (half) {
    const int column = 4 * piece, count = K / 2 - column;
    store4(x, i + column, count, in.columns);
    store4(x, i + K / 2 + column, count, in.columns + 4);
  } else {
    store8(x, i + 8 * piece, K - 8 * piece, in);
  }
}

// (a, b) -> (a cos_a - b sin_a, b cos_b + a sin_b), or, if `backward`, with sines (-sin_b, -sin_a).
// a and b are values i and j of a piece.
__device__ __forceinline__ void rotate_values(Float8& x, int i, int j, const Float8& cos,
                                              const Float8& sin, bool backward) {
  const float a = x[i], b = x[j];
  x[i] = a * cos[i] - b * (backward ? -sin[j] : sin[i]);
  x[j] = b * cos[j] + a * (backward ? -sin[i] : sin[j]);
}

// x -> x * cos + rot(x) * sin for q and k, or, if `backward`, the gradient of x from that of the
// result.
__global__ void __launch_bounds__(kRopeTableThreads, 3) rope_table_kernel(const RopeTableParams p) {
  RowPlace at = row_place(p.layout);
  at.piece += static_cast<int>(blockIdx.y) * p.layout.pieces;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * p.layout.slots + at.slot;
  if (number >= p.tokens || at.head == kNoHead) return;
  const Token token = token_of(number, p.L);
  const Float8 cos = load_piece(p.cos.values, p.cos.row(token.b, token.l), at.piece, p.K, p.half);
  const Float8 sin = load_piece(p.sin.values, p.sin.row(token.b, token.l), at.piece, p.K, p.half);
  for (int row = at.head; row < p.H + p.G; row += p.layout.step) {
    const bool of_q = row < p.H;
    const int head = of_q ? row : row - p.H;
    const HeadsView from = select(of_q, p.q, p.k), to = select(of_q, p.q_out, p.k_out);
    Float8 x = load_piece(from.values, from.at(token.b, token.l, head), at.piece, p.K, p.half);
    if (p.half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rotate_values(x, i, i + 4, cos, sin, p.backward);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i += 2) rotate_values(x, i, i + 1, cos, sin, p.backward);
    }
    store_piece(to.values, to.at(token.b, token.l, head), at.piece, p.K, p.half, x);
  }
}

}  // namespace lumina_kernels::cuda
