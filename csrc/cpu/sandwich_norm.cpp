// CPU kernels of sandwich_norm: a row is read once from memory, then from the L1 cache.
#define LUMINA_FILE "cpu/sandwich_norm.cpp"
#include "cpu/lib/sandwich.h"
#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {
namespace {

struct SandwichNormFwd {
  Chunks chunks;
  Rows y, residual, out;
  float* rstd;
  Gate gate;
  float eps;
};

struct SandwichNormBwd {
  Chunks chunks;
  Rows dout, y, dy;
  Rows rstd;
  Gate gate;
  GateGrads grads;
  Partials partials;
};

}  // namespace
}  // namespace lumina_kernels::cpu
#endif
#include "cpu/lib/levels.h"

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// out = residual + tanh(gate) * y * rstd * weight,  rstd = 1 / sqrt(mean(y²) + eps)
void sandwich_norm_fwd(const SandwichNormFwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b;
  float *opening = scratch, *factor = scratch + op.chunks.width;
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    if (chunk.changes_at(l, op.gate.per_token)) read(op.gate, b, l, D, opening, factor);
    const Row y = op.y(b, l), residual = op.residual(b, l), out = op.out(b, l);
    const float rstd =
        rms_rstd(D, op.eps, [&](int64_t i, int64_t count) { return load(y, i, count); });
    op.rstd[b * op.chunks.L + l] = rstd;
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec n = load(y, i, count) * rstd;
      store(out, i, load(residual, i, count) + n * load(factor + i), count);
    });
  }
}

// With n = y * rstd and d = dout * tanh(gate) * weight, dy = rstd * (d - n * mean(d * n)).
// partials: the sum of sandwich_bwd over the chunk's rows.
void sandwich_norm_bwd(const SandwichNormBwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b;
  float *opening = scratch, *factor = scratch + op.chunks.width;
  GateRow row(op.gate, op.partials(b, chunk.index, 0), opening, factor, D);
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    if (chunk.changes_at(l, op.gate.per_token)) read(op.gate, b, l, D, opening, factor);
    if (op.gate.per_token) row.dgate = op.grads.gate(b, l);
    const Row dout = op.dout(b, l), y = op.y(b, l), dy = op.dy(b, l);
    const float rstd = *float_at(op.rstd, b, l);
    const auto gradient = [&](int64_t i, int64_t count) -> NormGradient {
      const Vec n = load(y, i, count) * rstd;
      return {sandwich_bwd(row, i, count, load(dout, i, count), n), n};
    };
    const NormBwd norm = norm_bwd_means(D, false, rstd, gradient);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec d = load(dout, i, count) * load(factor + i);
      store(dy, i, norm(d, load(y, i, count) * rstd), count);
    });
  }
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor> sandwich_norm_fwd(const Tensor& y, const Tensor& residual,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& gate, double eps, bool tanh) {
  Tensor out = empty_as(residual);
  Tensor rstd = empty(y, {y.size(0), y.size(1)}, ScalarType::Float);
  if (y.numel() == 0) return {out, rstd};
  const SandwichNormFwd op{.chunks = Chunks(y),
                           .y = rows_of(y),
                           .residual = rows_of(residual),
                           .out = rows_of(out),
                           .rstd = floats_of(rstd),
                           .gate = Gate(weight, gate, tanh),
                           .eps = static_cast<float>(eps)};
  parallel_chunks(op.chunks, 2, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(sandwich_norm_fwd, op, chunk, scratch);
  });
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor> sandwich_norm_bwd(const Tensor& dout, const Tensor& y,
                                                     const OptionalTensor& weight,
                                                     const OptionalTensor& gate, bool tanh,
                                                     const Tensor& rstd) {
  Tensor dy = empty_as(y);
  if (y.numel() == 0) return {dy, zeros_as(weight, y), zeros_as(gate, y)};
  const Chunks chunks(y);
  const SandwichNormBwd op{.chunks = chunks,
                           .dout = rows_of(dout),
                           .y = rows_of(y),
                           .dy = rows_of(dy),
                           .rstd = rows_of(rstd),
                           .gate = Gate(weight, gate, tanh),
                           .grads = GateGrads(weight, gate, y),
                           .partials = Partials(y, chunks, 1)};
  parallel_chunks(chunks, 2, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(sandwich_norm_bwd, op, chunk, scratch);
  });
  parallel_columns(chunks.D, op.partials.work(), [&](int64_t begin, int64_t end) {
    LUMINA_CALL(finish, op.gate, op.grads, op.partials, 0, begin, end);
  });
  return {dy, op.grads.dweight, op.grads.dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("sandwich_norm_fwd", TORCH_BOX(&sandwich_norm_fwd));
  m.impl("sandwich_norm_bwd", TORCH_BOX(&sandwich_norm_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
