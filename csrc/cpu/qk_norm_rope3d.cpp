// CPU kernels of qk_norm_rope3d: a token's heads are read once, into a float32 buffer in the cache.
//
// The backward recomputes the statistics from the row, which it has to read anyway.
#define LUMINA_FILE "cpu/qk_norm_rope3d.cpp"
#include "cpu/lib/qk_norm.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

struct QkNormRope3dFwd {
  Angles angles;
  Norm norm;
  Normed q, k;
  Row q_out, k_out;
  int64_t L, K;
};

// The backward of q or of k.
struct NormedBwd {
  Normed from;
  Rows dout;
  Row dx;
  int sums;                     // 0 without parameters, 1 for a weight, 2 for weight and bias
  const Pool* pool;             // of k, if dout is the gradient of means over windows
  std::vector<float> partials;  // (chunks, sums, heads * K)
};

struct QkNormRope3dBwd {
  const Angles* angles;        // or null
  const RotaryTables* tables;  // if the rotation is by tables
  Norm norm;
  int64_t L, K, tokens, chunk;
  NormedBwd sides[2];
};

}  // namespace lumina_kernels::cpu
#endif

#include "cpu/lib/levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// x -> rotate(norm(x) * weight + bias) for q and k.
void qk_norm_rope3d_fwd(const QkNormRope3dFwd& op, const Tokens& tokens) {
  const int64_t L = op.L, K = op.K, most = std::max(op.q.heads, op.k.heads);
  float* row = scratch(padded(most * K) + kChunk * rotation_size(K));
  float* memory = row + padded(most * K);
  make_rotations(op.angles, tokens, memory, K);
  const auto rotate_tokens = [&](const Normed& from, int64_t b, Row out) {
    const int64_t size = from.heads * K;
    float* at = memory;
    for (int64_t l = tokens.l; l < tokens.end; ++l, at += rotation_size(K)) {
      const Row to = out + (b * L + l) * size;
      if (l + 1 < L) prefetch(heads_at(from.x, b, l + 1, from.heads, K), to + size);
      norm_rotate(heads_at(from.x, b, l, from.heads, K), from.weight(), from.bias(), op.norm,
                  rotation_in(at, K), K, to, row);
    }
  };
  for (int64_t b = tokens.b; b < tokens.b + tokens.samples; ++b) {
    rotate_tokens(op.q, b, op.q_out);
    rotate_tokens(op.k, b, op.k_out);
  }
}

// grad = share * dout, rotated back
inline void rotate_back(const TokenHeads& dout, float share, Rotation rotation, int64_t K,
                        float* grad) {
  for (int64_t n = 0; n < dout.count; ++n) {
    const Row from = dout.row + n * dout.step;
    float* piece = grad + n * dout.length;
    for_channels(dout.length, K, [&](int64_t i, int64_t c, int64_t count) {
      store(piece + i, rotated(share * load(from, i, count), rotation, c), count);
    });
  }
}

// With n the normalised row, d the gradient that `grad` holds, and g = d * weight, dx = rstd * (g -
// mean(g) - n * mean(g * n)), without mean(g) for an RMS norm, dweight += d * n and dbias += d.
// `row` and `grad` are buffers for the padded token.
inline void norm_bwd(const TokenHeads& x, const float* weight, Norm norm, int64_t K, Row dx,
                     float* row, float* grad, float* dweight, float* dbias) {
  stage(x, row);
  const int64_t size = x.size(), length = norm.per_head ? K : size;
  for (int64_t at = 0; at < size; at += length) {
    const auto [mean, rstd] = moments_of(row + at, length, norm);
    Vec along{}, shift{};
    for_vectors(length, [&, mean = mean, rstd = rstd](int64_t i, int64_t count) {
      i += at;
      const Vec raw = load(row + i), d = load(grad + i), n = (raw - mean) * rstd;
      const Vec g = weight == nullptr ? d : d * load(weight + i);
      store(row + i, first(count, n, raw));
      store(grad + i, first(count, g, d));
      along += first(count, g * n, Vec{});
      shift += first(count, g, Vec{});
      if (dweight != nullptr) store(dweight + i, load(dweight + i) + first(count, d * n, Vec{}));
      if (dbias != nullptr) store(dbias + i, load(dbias + i) + first(count, d, Vec{}));
    });
    const float mean_along = sum(along) / static_cast<float>(length);
    const float mean_shift = norm.layer ? sum(shift) / static_cast<float>(length) : 0.f;
    for_whole_vectors(length, [&, rstd = rstd](int64_t i, int64_t count) {
      i += at;
      const Vec g = load(grad + i) - mean_shift;
      store(dx, i, rstd * (g - load(row + i) * mean_along), count);
    });
  }
}

// One token of q or of k. A pooled token gets its share of its window's gradient, a masked one
// nothing.
inline void token_bwd(const QkNormRope3dBwd& op, const NormedBwd& side, int64_t b, int64_t l,
                      float* memory, float* row, float* grad, float* dweight, float* dbias) {
  const int64_t K = op.K, H = side.from.heads;
  const Row dx = side.dx + (b * op.L + l) * (H * K);
  int64_t l_out = l;
  float share = 1;
  if (const Pool* pool = side.pool) {
    if (!pool->mask(b, l)) return fill_zeros(dx, H * K);
    l_out = pool->windows.of(l);
    share = 1.f / pool->counts[b * pool->windows.count() + l_out];  // at least 1: this token
  }
  const TokenHeads dout = heads_at(side.dout, b, l_out, H, K);
  if (op.tables != nullptr) {
    rotate_token(*op.tables, dout, b, l, K, memory, {reinterpret_cast<char*>(grad), Dtype::kFloat});
  } else {
    rotate_back(dout, share, rotation_in(memory, K), K, grad);
  }
  norm_bwd(heads_at(side.from.x, b, l, H, K), side.from.weight(), op.norm, K, dx, row, grad,
           side.sums > 0 ? dweight : nullptr, side.sums > 1 ? dbias : nullptr);
}

// The tokens of a chunk, and their sums of dweight and dbias.
void qk_norm_bwd(QkNormRope3dBwd& op, int64_t chunk) {
  const int64_t K = op.K;
  const int64_t room = padded(std::max(op.sides[0].from.heads, op.sides[1].from.heads) * K);
  float* memory = scratch(tables_size(K) + 6 * room);
  float *row = memory + tables_size(K), *grad = row + room, *sums = grad + room;
  std::fill(sums, sums + 4 * room, 0.f);
  const int64_t begin = chunk * op.chunk, end = std::min(begin + op.chunk, op.tokens);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / op.L, l = token % op.L;
    if (op.angles != nullptr) make_rotation(*op.angles, b, l, rotation_in(memory, K));
    token_bwd(op, op.sides[0], b, l, memory, row, grad, sums, sums + room);
    token_bwd(op, op.sides[1], b, l, memory, row, grad, sums + 2 * room, sums + 3 * room);
  }
  for (int n = 0; n < 2; ++n) {
    NormedBwd& side = op.sides[n];
    const int64_t width = side.from.heads * K;
    for (int i = 0; i < side.sums; ++i) {
      const float* from = sums + (2 * n + i) * room;
      std::copy(from, from + width, side.partials.data() + (chunk * side.sums + i) * width);
    }
  }
}

// out = the sum of `count` rows that are `step` apart.
void sum_rows(const float* rows, int64_t step, int64_t count, Row out, int64_t length) {
  for_vectors(length, [&](int64_t i, int64_t lanes) {
    Vec sums[4] = {};
    int64_t n = 0;
    for (; n + 4 <= count; n += 4)
      for (int m = 0; m < 4; ++m) sums[m] += load(rows + (n + m) * step + i, lanes);
    for (; n < count; ++n) sums[0] += load(rows + n * step + i, lanes);
    store(out, i, (sums[0] + sums[1]) + (sums[2] + sums[3]), lanes);
  });
}

void spread_row(Row from, float* to, int64_t length) {
  for_vectors(length, [&](int64_t i, int64_t n) { store(to + i, load(from, i, n), n); });
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {

std::vector<float> spread(const OptionalTensor& parameter, int64_t times) {
  if (!parameter) return {};
  const int64_t width = parameter->size(0);
  std::vector<float> values(padded(times * width));
  const Rows rows = rows_of(*parameter);
  for (int64_t n = 0; n < times; ++n)
    LUMINA_CALL(spread_row, rows.base, values.data() + n * width, width);
  return values;
}

namespace {

constexpr int64_t kLeastTokens = 16, kMostChunks = 256;
constexpr int64_t kColumns = 64;  // that a thread sums at a time

std::tuple<Tensor, Tensor> qk_norm_rope3d_fwd(
    const Tensor& q, const Tensor& k, const OptionalTensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& k_weight, const OptionalTensor& k_bias, const Tensor& positions,
    const Tensor& inv_freq, const Tensor& axis, double eps, const std::string& norm_name) {
  Tensor q_out = empty_as(q), k_out = empty_as(k);
  if (q.numel() + k.numel() == 0) return {q_out, k_out};
  const Norm norm(norm_name, eps);
  const QkNormRope3dFwd op{.angles = Angles(positions, inv_freq, axis),
                           .norm = norm,
                           .q = Normed(q, q_weight, q_bias, norm),
                           .k = Normed(k, k_weight, k_bias, norm),
                           .q_out = row_of(q_out),
                           .k_out = row_of(k_out),
                           .L = q.size(1),
                           .K = q.size(3)};
  const int64_t work = 2 * (q.size(2) + k.size(2)) * op.K;
  for_token_chunks(op.angles.shared(), q.size(0), op.L, work,
                   [&](const Tokens& tokens) { LUMINA_CALL(qk_norm_rope3d_fwd, op, tokens); });
  return {q_out, k_out};
}

// A parameter's gradient: sum `index` of all chunks, and of all heads if they share the parameter.
Tensor parameter_grad(const OptionalTensor& parameter, const NormedBwd& side, int index,
                      const QkNormRope3dBwd& op, const Tensor& like) {
  if (!parameter) return empty(like, {0}, ScalarType::Float);
  Tensor grad = empty_as(*parameter);
  const int64_t width = parameter->size(0), all = side.from.heads * op.K;
  const int64_t chunks = ceil_div(op.tokens, op.chunk);
  const int64_t step = op.norm.per_head ? width : side.sums * all;
  const int64_t count = op.norm.per_head ? chunks * side.from.heads : chunks;
  const float* first = side.partials.data() + index * all;
  parallel_rows(ceil_div(width, kColumns), count * kColumns, [&](int64_t n) {
    const int64_t at = n * kColumns;
    LUMINA_CALL(sum_rows, first + at, step, count, row_of(grad) + at,
                std::min(kColumns, width - at));
  });
  return grad;
}

NormedBwd side_of(const Tensor& dout, const Tensor& x, const OptionalTensor& weight,
                  const OptionalTensor& bias, Norm norm, const Tensor& dx, int64_t chunks,
                  const Pool* pool) {
  const int sums = bias ? 2 : weight ? 1 : 0;
  return {Normed(x, weight, OptionalTensor(), norm),
          rows_of(dout),
          row_of(dx),
          sums,
          pool,
          std::vector<float>(chunks * sums * x.size(2) * x.size(3))};
}

}  // namespace

SixTensors qk_norm_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k,
                       const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                       const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                       const Angles* angles, const RotaryTables* tables, Norm norm,
                       const Pool* pool) {
  Tensor dq = empty_as(q), dk = empty_as(k);
  const int64_t tokens = q.size(0) * q.size(1);
  const int64_t chunk = std::max(kLeastTokens, ceil_div(tokens, kMostChunks));
  const int64_t chunks = ceil_div(tokens, chunk);
  QkNormRope3dBwd op{.angles = angles,
                     .tables = tables,
                     .norm = norm,
                     .L = q.size(1),
                     .K = q.size(3),
                     .tokens = tokens,
                     .chunk = chunk,
                     .sides = {side_of(dq_out, q, q_weight, q_bias, norm, dq, chunks, nullptr),
                               side_of(dk_out, k, k_weight, k_bias, norm, dk, chunks, pool)}};
  parallel_rows(chunks, 8 * chunk * (q.size(2) + k.size(2)) * op.K,
                [&](int64_t n) { LUMINA_CALL(qk_norm_bwd, op, n); });
  return {dq,
          dk,
          parameter_grad(q_weight, op.sides[0], 0, op, q),
          parameter_grad(q_bias, op.sides[0], 1, op, q),
          parameter_grad(k_weight, op.sides[1], 0, op, q),
          parameter_grad(k_bias, op.sides[1], 1, op, q)};
}

namespace {

SixTensors qk_norm_rope3d_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q,
                              const Tensor& k, const OptionalTensor& q_weight,
                              const OptionalTensor& q_bias, const OptionalTensor& k_weight,
                              const OptionalTensor& k_bias, const Tensor& positions,
                              const Tensor& inv_freq, const Tensor& axis, double eps,
                              const std::string& norm) {
  const Angles angles(positions, inv_freq, axis, -1);
  return qk_norm_bwd(dq_out, dk_out, q, k, q_weight, q_bias, k_weight, k_bias, &angles, nullptr,
                     Norm(norm, eps), nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("qk_norm_rope3d_fwd", TORCH_BOX(&qk_norm_rope3d_fwd));
  m.impl("qk_norm_rope3d_bwd", TORCH_BOX(&qk_norm_rope3d_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
