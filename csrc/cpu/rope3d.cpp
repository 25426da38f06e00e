// CPU kernels of rope3d: a token's cosines and sines once, then all its heads of q and of k.
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

// (a, b) -> (a cos - b sin, a sin + b cos) with the angle sign * position[axis] * inv_freq, for
// token l of `count` samples from b on, which share the angles
void rope3d(const Rope3d& op, int64_t b, int64_t l, int64_t count) {
  const auto [L, H, G, K] = std::tuple{op.L, op.H, op.G, op.K};
  const Rotation rotation = rotation_in(scratch(rotation_size(K)), K);
  make_rotation(op.angles, b, l, rotation);
  const auto rotate_token = [&](const Rows& x, int64_t heads, Row out) {
    const int64_t at = (b * L + l) * (heads * K);
    if (l + 1 < L) prefetch(heads_at(x, b, l + 1, heads, K), out + (at + heads * K));
    rotate_heads(heads_at(x, b, l, heads, K), rotation, K, out + at);
  };
  for (const int64_t end = b + count; b < end; ++b) {
    rotate_token(op.q, H, op.q_out);
    rotate_token(op.k, G, op.k_out);
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
  for_tokens(angles.shared(), B, L, (H + G) * K,
             [&](int64_t b, int64_t l, int64_t count) { LUMINA_CALL(rope3d, op, b, l, count); });
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
