// CPU kernels of rope_table: a token's cosines and sines are read once, for all its heads of q and
// k that share them.
#define LUMINA_FILE "cpu/rope_table.cpp"
#include "cpu/lib/rope_table.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

struct RopeTable {
  RotaryTables tables;
  Rows q, k, q_out, k_out;  // k may be missing
  int64_t H, G, K;
};

}  // namespace lumina_kernels::cpu
#endif

#include "cpu/lib/levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// x -> x * cos + rot(x) * sin for q and k, or, if the tables are of the backward, the gradient of x
// from that of the result; for token l of `count` samples from b on, which share the tables.
// Flattened, as calling a loop's body for each vector would cost a third of the time.
__attribute__((flatten)) void rope_table(const RopeTable& op, int64_t b, int64_t l, int64_t count) {
  const RotaryTables& tables = op.tables;
  float* memory = scratch(tables_size(tables.C));
  for (int64_t h = 0; h < tables.T; ++h) {
    const Rotation rotation = make_rotation(tables, b, l, h, memory);
    const auto rotate = [&](const Rows& x, const Rows& out, int64_t sample, int64_t heads) {
      TokenHeads from = heads_at(x, sample, l, tables.T == 1 ? heads : 1, op.K);
      from.row = x(sample, l, h);
      rotate_by(tables, from, rotation, op.K, out(sample, l, h));
    };
    for (int64_t n = b; n < b + count; ++n) {
      rotate(op.q, op.q_out, n, op.H);
      if (op.k) rotate(op.k, op.k_out, n, op.G);
    }
  }
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const OptionalTensor& k,
                                  const RotaryTables& tables) {
  Tensor q_out = empty_as(q), k_out = k ? empty_as(*k) : nothing(q);
  if (q.numel() + k_out.numel() == 0) return {q_out, k_out};
  const RopeTable op{.tables = tables,
                     .q = rows_of(q),
                     .k = rows_of(k),
                     .q_out = rows_of(q_out),
                     .k_out = k ? rows_of(k_out) : Rows{},
                     .H = q.size(2),
                     .G = k ? k->size(2) : 0,
                     .K = q.size(3)};
  for_tokens(
      tables.shared(), q.size(0), q.size(1), (op.H + op.G) * op.K,
      [&](int64_t b, int64_t l, int64_t count) { LUMINA_CALL(rope_table, op, b, l, count); });
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> rope_table_fwd(const Tensor& q, const OptionalTensor& k,
                                          const Tensor& cos, const Tensor& sin,
                                          const std::string& pairing, int64_t channels) {
  return rotate(q, k, RotaryTables(cos, sin, pairing, channels, false));
}

std::tuple<Tensor, Tensor> rope_table_bwd(const Tensor& dq_out, const OptionalTensor& dk_out,
                                          const Tensor& cos, const Tensor& sin,
                                          const std::string& pairing, int64_t channels) {
  return rotate(dq_out, dk_out, RotaryTables(cos, sin, pairing, channels, true));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("rope_table_fwd", TORCH_BOX(&rope_table_fwd));
  m.impl("rope_table_bwd", TORCH_BOX(&rope_table_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
