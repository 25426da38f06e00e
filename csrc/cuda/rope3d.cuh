// CUDA kernel of rope3d: a block rotates all heads of q and k of some tokens.
#pragma once

#include "cuda/lib/rope.cuh"

namespace lumina_kernels::cuda {

constexpr int kRope3dThreads = 256;
constexpr int kRope3dHeads = 2;  // that a thread rotates at a time, so that their loads overlap

struct Rope3dParams {
  HeadsView q, k, q_out, k_out;
  AnglesView angles;
  RowLayout layout;
  int64_t tokens, L;
  int H, G, K;
  float sign;
};

inline LaunchConfig rope3d_config(const RowLayout& layout, int64_t tokens, int64_t K) {
  return token_config(layout, tokens, ceil_div(K, 8),
                      layout.slots * rotation_floats(layout.pieces));
}

// (a, b) -> (a cos - b sin, a sin + b cos) with the angle sign * position[axis] * inv_freq.
__global__ void __launch_bounds__(kRope3dThreads, 3) rope3d_kernel(const Rope3dParams p) {
  LUMINA_DYNAMIC_SHARED(float, rotations);
  const RowPlace at = row_place(p.layout);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * p.layout.slots + at.slot;
  const Token tokens[] = {token_of(number < p.tokens ? number : p.tokens - 1, p.L)};
  const Token& token = tokens[0];
  const int heads = number < p.tokens ? p.H + p.G : 0;
  const int first_piece = static_cast<int>(blockIdx.y) * p.layout.pieces;
  const int column = 8 * (first_piece + at.piece), count = p.K - column;
  Bits8 bits[kRope3dHeads];

  auto load = [&](int first) {
#pragma unroll
    for (int n = 0; n < kRope3dHeads; ++n) {
      const int head = first + n * p.layout.step;
      const HeadsView from = select(head < p.H, p.q, p.k);
      const int64_t start = from.at(token.b, token.l, head < p.H ? head : head - p.H);
      bits[n] = load_bits8(from.values, start + column, head < heads ? count : 0);
    }
  };
  load(at.head);
  fill_rotations(p.angles, tokens, p.sign, 4 * first_piece, p.K, p.layout, at, rotations);
  __syncthreads();
  const PieceRotation rotation = load_rotation(rotations, p.layout, at.slot, at.piece);
  for (int first = at.head; first < heads;) {
#pragma unroll
    for (int n = 0; n < kRope3dHeads; ++n) {
      const int head = first + n * p.layout.step;
      if (head >= heads) break;
      Float8 x = to_float8(bits[n], head < p.H ? p.q.values.dtype : p.k.values.dtype);
      rotate_piece(x, rotation);
      const HeadsView to = select(head < p.H, p.q_out, p.k_out);
      const int64_t start = to.at(token.b, token.l, head < p.H ? head : head - p.H);
      store8(to.values, start + column, count, x);
    }
    first += kRope3dHeads * p.layout.step;
    if (first < heads) load(first);
  }
}

}  // namespace lumina_kernels::cuda
