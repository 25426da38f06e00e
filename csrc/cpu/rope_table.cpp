// CPU kernels of rope_table: a token's cosines and sines once, then all its heads of q and of k.
#define LUMINA_FILE "cpu/rope_table.cpp"
#include "cpu/lib/rope.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

struct RopeTable {
  Rows cos, sin, q, k, q_out, k_out;  // no k: nothing to do
  bool half, back;
  int64_t H, G, K;
};

}  // namespace lumina_kernels::cpu
#endif

#include "cpu/lib/levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// The even channel of a pair adds -sin_a b, the odd one sin_b a; backwards sin_b b and -sin_a a.
inline void make_interleaved(Row sin, bool back, int64_t K, float* to) {
  const LongVec flip = LongVec{} + (back ? uint64_t{1} << 63 : uint64_t{1} << 31);
  for_whole_vectors(K, [&](int64_t i, int64_t count) {
    const Vec values = load(sin, i, count);
    store(to + i, (Vec)((LongVec)(back ? swapped(values) : values) ^ flip), count);
  });
  repeat(to, K);
}

// The same for channels j and j + K/2.
inline void make_half(Row sin, bool back, int64_t K, float* to) {
  const int64_t M = K / 2;
  const Row a = back ? sin + M : sin, b = back ? sin : sin + M;
  for_whole_vectors(M, [&](int64_t j, int64_t count) {
    const Vec first = load(a, j, count), second = load(b, j, count);
    store(to + j, back ? first : -first, count);
    store(to + M + j, back ? -second : second, count);
  });
}

inline void rotate_half(const TokenHeads& x, Rotation rotation, int64_t K, Row out) {
  const int64_t M = K / 2;
  const float *cos_a = rotation.cos, *cos_b = cos_a + M, *sin_a = rotation.sin, *sin_b = sin_a + M;
  for (int64_t at = 0; at < x.size(); at += K) {
    const Row from = x.row + at / x.length * x.step + at % x.length, to = out + at;
    for_whole_vectors(M, [&](int64_t j, int64_t count) {
      const Vec a = load(from, j, count), b = load(from + M, j, count);
      store(to, j, a * load(cos_a + j) + b * load(sin_a + j), count);
      store(to + M, j, b * load(cos_b + j) + a * load(sin_b + j), count);
    });
  }
}

// x -> x * cos + rot(x) * sin of q and k for token l of `count` samples from b on, which share the
// table; or with `back` the gradient of x from that of this
void rope_table(const RopeTable& op, int64_t b, int64_t l, int64_t count) {
  const auto [H, G, K] = std::tuple{op.H, op.G, op.K};
  const Rotation rotation = rotation_in(scratch(rotation_size(K)), K);
  stage({op.cos(b, l), 1, K, 0}, rotation.cos);
  repeat(rotation.cos, K);
  op.half ? make_half(op.sin(b, l), op.back, K, rotation.sin)
          : make_interleaved(op.sin(b, l), op.back, K, rotation.sin);
  const auto rotate_token = [&](const TokenHeads& x, Row out) {
    op.half ? rotate_half(x, rotation, K, out) : rotate_heads(x, rotation, K, out);
  };
  for (const int64_t end = b + count; b < end; ++b) {
    rotate_token(heads_at(op.q, b, l, H, K), op.q_out(b, l));
    if (op.k) rotate_token(heads_at(op.k, b, l, G, K), op.k_out(b, l));
  }
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

// (L, K) or (B, L, K) rows for row(b, l).
Rows table_of(const Tensor& table) {
  Rows rows = rows_of(table);
  if (table.dim() == 2) rows.l = rows.b, rows.b = 0;
  return rows;
}

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const OptionalTensor& k, const Tensor& cos,
                                  const Tensor& sin, const std::string& pairing, bool back) {
  Tensor q_out = empty_as(q), k_out = k ? empty_as(*k) : nothing(q);
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), K = q.size(3);
  const int64_t G = k ? k->size(2) : 0;
  if (B * L * K == 0) return {q_out, k_out};
  const RopeTable op{.cos = table_of(cos),
                     .sin = table_of(sin),
                     .q = rows_of(q),
                     .k = rows_of(k),
                     .q_out = rows_of(q_out),
                     .k_out = k ? rows_of(k_out) : Rows{},
                     .half = pairing == "half",
                     .back = back,
                     .H = H,
                     .G = G,
                     .K = K};
  const bool shared = cos.dim() == 2 && sin.dim() == 2;
  for_tokens(shared, B, L, (H + G) * K, [&](int64_t b, int64_t l, int64_t count) {
    LUMINA_CALL(rope_table, op, b, l, count);
  });
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> rope_table_fwd(const Tensor& q, const OptionalTensor& k,
                                          const Tensor& cos, const Tensor& sin,
                                          const std::string& pairing) {
  return rotate(q, k, cos, sin, pairing, false);
}

std::tuple<Tensor, Tensor> rope_table_bwd(const Tensor& dq_out, const OptionalTensor& dk_out,
                                          const Tensor& cos, const Tensor& sin,
                                          const std::string& pairing) {
  return rotate(dq_out, dk_out, cos, sin, pairing, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("rope_table_fwd", TORCH_BOX(&rope_table_fwd));
  m.impl("rope_table_bwd", TORCH_BOX(&rope_table_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
