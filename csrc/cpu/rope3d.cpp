// CPU kernels of rope3d: a token's cosines and sines are computed once, for all its heads of q and
// k, in all samples that share its position.
#define LUMINA_FILE "cpu/rope3d.cpp"
#include "cpu/lib/rope.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

struct Rope3d {
  Angles angles;
  Rows q, k;
  Row q_out, k_out;
  int64_t L, H, G, K;
};

}  // namespace lumina_kernels::cpu
#endif

#include "cpu/lib/levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// (a, b) -> (a cos - b sin, a sin + b cos) with the angle sign * position[axis] * inv_freq.
void rope3d(const Rope3d& op, const Tokens& tokens) {
  const auto [L, H, G, K] = std::tuple{op.L, op.H, op.G, op.K};
  float* memory = scratch(kChunk * rotation_size(K));
  make_rotations(op.angles, tokens, memory, K);
  const auto rotate_tokens = [&](const Rows& x, int64_t b, int64_t heads, Row out) {
    const int64_t size = heads * K;
    float* at = memory;
    for (int64_t l = tokens.l; l < tokens.end; ++l, at += rotation_size(K)) {
      const Row to = out + (b * L + l) * size;
      if (l + 1 < L) prefetch(heads_at(x, b, l + 1, heads, K), to + size);
      rotate_heads(heads_at(x, b, l, heads, K), rotation_in(at, K), K, to);
    }
  };
  for (int64_t b = tokens.b; b < tokens.b + tokens.samples; ++b) {
    rotate_tokens(op.q, b, H, op.q_out);
    rotate_tokens(op.k, b, G, op.k_out);
  }
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Tensor& k, const Angles& angles) {
  Tensor q_out = empty_as(q), k_out = empty_as(k);
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), G = k.size(2), K = q.size(3);
  if (B * L * K == 0) return {q_out, k_out};
  const Rope3d op{.angles = angles,
                  .q = rows_of(q),
                  .k = rows_of(k),
                  .q_out = row_of(q_out),
                  .k_out = row_of(k_out),
                  .L = L,
                  .H = H,
                  .G = G,
                  .K = K};
  for_token_chunks(angles.shared(), B, L, (H + G) * K,
                   [&](const Tokens& tokens) { LUMINA_CALL(rope3d, op, tokens); });
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> rope3d_fwd(const Tensor& q, const Tensor& k, const Tensor& positions,
                                      const Tensor& inv_freq, const Tensor& axis) {
  return rotate(q, k, Angles(positions, inv_freq, axis));
}

std::tuple<Tensor, Tensor> rope3d_bwd(const Tensor& dq_out, const Tensor& dk_out,
                                      const Tensor& positions, const Tensor& inv_freq,
                                      const Tensor& axis) {
  return rotate(dq_out, dk_out, Angles(positions, inv_freq, axis, -1));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("rope3d_fwd", TORCH_BOX(&rope3d_fwd));
  m.impl("rope3d_bwd", TORCH_BOX(&rope3d_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
