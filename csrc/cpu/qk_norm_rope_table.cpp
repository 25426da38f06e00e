// CPU kernels of qk_norm_rope_table: a token's heads are normalised in a float32 buffer in the
// cache and rotated from there. The backward is that of qk_norm_rope3d.
#define LUMINA_FILE "cpu/qk_norm_rope_table.cpp"
#include "cpu/lib/qk_norm.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

struct QkNormRopeTableFwd {
  RotaryTables tables;
  Norm norm;
  Normed q, k;
  Row q_out, k_out;
  int64_t L, K;
};

}  // namespace lumina_kernels::cpu
#endif

#include "cpu/lib/levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// x -> rotate(norm(x) * weight + bias) for q and k, for token l of sample b.
void qk_norm_rope_table_fwd(const QkNormRopeTableFwd& op, int64_t b, int64_t l) {
  const auto [L, K] = std::tuple{op.L, op.K};
  float* memory = scratch(tables_size(K) + padded(std::max(op.q.heads, op.k.heads) * K));
  float* row = memory + tables_size(K);
  const auto rotate = [&, L = L, K = K](const Normed& from, Row out) {
    const int64_t size = from.heads * K, at = (b * L + l) * size;
    if (l + 1 < L) prefetch(heads_at(from.x, b, l + 1, from.heads, K), out + (at + size));
    norm_row(heads_at(from.x, b, l, from.heads, K), from.weight(), from.bias(), op.norm, K, row);
    const Row normed{reinterpret_cast<char*>(row), Dtype::kFloat};
    rotate_token(op.tables, {normed, 1, size, 0}, b, l, K, memory, out + at);
  };
  rotate(op.q, op.q_out);
  rotate(op.k, op.k_out);
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor> qk_norm_rope_table_fwd(
    const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const Tensor& cos, const Tensor& sin, const std::string& pairing, int64_t channels, double eps,
    const std::string& norm_name) {
  Tensor q_out = empty_as(q), k_out = empty_as(k, q);
  if (q.numel() + k_out.numel() == 0) return {q_out, k_out};
  const Tensor keys = or_no_heads(k, q);
  const Norm norm(norm_name, eps);
  const QkNormRopeTableFwd op{.tables = RotaryTables(cos, sin, pairing, channels, false),
                              .norm = norm,
                              .q = Normed(q, q_weight, q_bias, norm),
                              .k = Normed(keys, k_weight, k_bias, norm),
                              .q_out = row_of(q_out),
                              .k_out = row_of(k_out),
                              .L = q.size(1),
                              .K = q.size(3)};
  parallel_rows(q.size(0) * op.L, 2 * (q.size(2) + keys.size(2)) * op.K, [&](int64_t token) {
    LUMINA_CALL(qk_norm_rope_table_fwd, op, token / op.L, token % op.L);
  });
  return {q_out, k_out};
}

SixTensors qk_norm_rope_table_bwd(const Tensor& dq_out, const OptionalTensor& dk_out,
                                  const Tensor& q, const OptionalTensor& k,
                                  const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                                  const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                                  const Tensor& cos, const Tensor& sin, const std::string& pairing,
                                  int64_t channels, double eps, const std::string& norm) {
  const RotaryTables tables(cos, sin, pairing, channels, true);
  SixTensors grads =
      qk_norm_bwd(dq_out, or_no_heads(dk_out, q), q, or_no_heads(k, q), q_weight, q_bias, k_weight,
                  k_bias, nullptr, &tables, Norm(norm, eps), nullptr);
  if (!k) std::get<1>(grads) = nothing(q);
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("qk_norm_rope_table_fwd", TORCH_BOX(&qk_norm_rope_table_fwd));
  m.impl("qk_norm_rope_table_bwd", TORCH_BOX(&qk_norm_rope_table_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
