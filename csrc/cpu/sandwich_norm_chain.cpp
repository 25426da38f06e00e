// CPU kernels of sandwich_norm_chain: a row stays in the L1 cache through both norms.
#define LUMINA_FILE "cpu/sandwich_norm_chain.cpp"
#include "cpu/lib/sandwich.h"
#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {
namespace {

struct SandwichNormChainFwd {
  Chunks chunks;
  Rows y, residual, new_residual, normed;
  float *rstd, *next_rstd;
  Gate gate;
  Modulation next;
  float eps;
};

struct SandwichNormChainBwd {
  Chunks chunks;
  Rows dnew_residual, dnormed, y, residual, dy, dresidual;
  Rows rstd, next_rstd;
  Gate gate;
  GateGrads gate_grads;
  Modulation next;
  ModulationGrads next_grads;
  Partials partials;
};

constexpr int64_t kGateSum = ModulationGrads::kSums;

}  // namespace
}  // namespace lumina_kernels::cpu
#endif
#include "cpu/lib/levels.h"

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// new_residual = residual + tanh(gate) * y * rstd * weight,
// normed = new_residual * next_rstd * next_weight * (1 + next_scale)
void sandwich_norm_chain_fwd(const SandwichNormChainFwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b, width = op.chunks.width;
  float *opening = scratch, *factor = opening + width, *next_factor = factor + width;
  float *next_offset = next_factor + width, *values = next_offset + width;
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    if (chunk.changes_at(l, op.gate.per_token)) read(op.gate, b, l, D, opening, factor);
    if (chunk.changes_at(l, op.next.per_token)) read(op.next, b, l, D, next_factor, next_offset);
    const Row y = op.y(b, l), residual = op.residual(b, l);
    const Row new_residual = op.new_residual(b, l), normed = op.normed(b, l);
    const float rstd =
        rms_rstd(D, op.eps, [&](int64_t i, int64_t count) { return load(y, i, count); });
    const float next_rstd = rms_rstd(D, op.eps, [&](int64_t i, int64_t count) {
      const Vec n = load(y, i, count) * rstd;
      const Vec value = load(residual, i, count) + n * load(factor + i);
      store(values + i, value);
      store(new_residual, i, value, count);
      return value;
    });
    for_vectors(D, [&](int64_t i, int64_t count) {
      store(normed, i, load(values + i) * next_rstd * load(next_factor + i), count);
    });
    op.rstd[b * op.chunks.L + l] = rstd;
    op.next_rstd[b * op.chunks.L + l] = next_rstd;
  }
}

// dresidual is dnew_residual plus the gradient of the next norm's input, and dy follows from it as
// in sandwich_norm. Rows of new_residual are recomputed: what the forward wrote was rounded.
// partials: the sums of modulate_bwd and sandwich_bwd over the chunk's rows.
void sandwich_norm_chain_bwd(const SandwichNormChainBwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b, width = op.chunks.width;
  float *opening = scratch, *factor = opening + width, *next_factor = factor + width;
  float *next_offset = next_factor + width, *values = next_offset + width;
  ModulationRow next(op.next, op.next_grads, op.partials, chunk, next_factor);
  GateRow row(op.gate, op.partials(b, chunk.index, kGateSum), opening, factor, D);
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    if (chunk.changes_at(l, op.gate.per_token)) read(op.gate, b, l, D, opening, factor);
    if (chunk.changes_at(l, op.next.per_token)) read(op.next, b, l, D, next_factor, next_offset);
    if (op.gate.per_token) row.dgate = op.gate_grads.gate(b, l);
    next.move_to(op.next, op.next_grads, b, l);
    const Row dnew_residual = op.dnew_residual(b, l), dnormed = op.dnormed(b, l), y = op.y(b, l);
    const Row residual = op.residual(b, l), dy = op.dy(b, l), dresidual = op.dresidual(b, l);
    const float rstd = *float_at(op.rstd, b, l), next_rstd = *float_at(op.next_rstd, b, l);
    const auto next_gradient = [&](int64_t i, int64_t count) -> NormGradient {
      const Vec new_residual =
          load(residual, i, count) + load(y, i, count) * rstd * load(factor + i);
      const Vec n = new_residual * next_rstd;
      store(values + i, n);
      return {modulate_bwd(next, i, count, load(dnormed, i, count), n), n};
    };
    const NormBwd next_norm = norm_bwd_means(D, false, next_rstd, next_gradient);
    const auto gradient = [&](int64_t i, int64_t count) -> NormGradient {
      const Vec dn = load(dnormed, i, count) * load(next_factor + i);
      const Vec d = load(dnew_residual, i, count) + next_norm(dn, load(values + i));
      store(values + i, d);
      store(dresidual, i, d, count);
      const Vec n = load(y, i, count) * rstd;
      return {sandwich_bwd(row, i, count, d, n), n};
    };
    const NormBwd norm = norm_bwd_means(D, false, rstd, gradient);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec d = load(values + i) * load(factor + i);
      store(dy, i, norm(d, load(y, i, count) * rstd), count);
    });
  }
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sandwich_norm_chain_fwd(
    const Tensor& y, const Tensor& residual, const OptionalTensor& weight,
    const OptionalTensor& gate, const OptionalTensor& next_weight, const OptionalTensor& next_scale,
    double eps, bool tanh) {
  Tensor new_residual = empty_as(residual), normed = empty_as(residual);
  Tensor rstd = empty(y, {y.size(0), y.size(1)}, ScalarType::Float), next_rstd = empty_as(rstd);
  if (y.numel() == 0) return {new_residual, normed, rstd, next_rstd};
  const SandwichNormChainFwd op{.chunks = Chunks(y),
                                .y = rows_of(y),
                                .residual = rows_of(residual),
                                .new_residual = rows_of(new_residual),
                                .normed = rows_of(normed),
                                .rstd = floats_of(rstd),
                                .next_rstd = floats_of(next_rstd),
                                .gate = Gate(weight, gate, tanh),
                                .next = Modulation(next_weight, {}, next_scale, {}),
                                .eps = static_cast<float>(eps)};
  parallel_chunks(op.chunks, 5, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(sandwich_norm_chain_fwd, op, chunk, scratch);
  });
  return {new_residual, normed, rstd, next_rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sandwich_norm_chain_bwd(
    const Tensor& dnew_residual, const Tensor& dnormed, const Tensor& y, const Tensor& residual,
    const OptionalTensor& weight, const OptionalTensor& gate, const OptionalTensor& next_weight,
    const OptionalTensor& next_scale, bool tanh, const Tensor& rstd, const Tensor& next_rstd) {
  Tensor dy = empty_as(y), dresidual = empty_as(residual);
  if (y.numel() == 0) {
    return {dy,
            dresidual,
            zeros_as(weight, y),
            zeros_as(gate, y),
            zeros_as(next_weight, y),
            zeros_as(next_scale, y)};
  }
  const Chunks chunks(y);
  const SandwichNormChainBwd op{.chunks = chunks,
                                .dnew_residual = rows_of(dnew_residual),
                                .dnormed = rows_of(dnormed),
                                .y = rows_of(y),
                                .residual = rows_of(residual),
                                .dy = rows_of(dy),
                                .dresidual = rows_of(dresidual),
                                .rstd = rows_of(rstd),
                                .next_rstd = rows_of(next_rstd),
                                .gate = Gate(weight, gate, tanh),
                                .gate_grads = GateGrads(weight, gate, y),
                                .next = Modulation(next_weight, {}, next_scale, {}),
                                .next_grads = ModulationGrads(next_weight, {}, next_scale, {}, y),
                                .partials = Partials(y, chunks, kGateSum + 1)};
  parallel_chunks(chunks, 5, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(sandwich_norm_chain_bwd, op, chunk, scratch);
  });
  parallel_columns(chunks.D, op.partials.work(), [&](int64_t begin, int64_t end) {
    LUMINA_CALL(finish, op.next, op.next_grads, op.partials, begin, end);
    LUMINA_CALL(finish, op.gate, op.gate_grads, op.partials, kGateSum, begin, end);
  });
  const auto& next = op.next_grads.tensors;
  return {dy, dresidual, op.gate_grads.dweight, op.gate_grads.dgate, next[0], next[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("sandwich_norm_chain_fwd", TORCH_BOX(&sandwich_norm_chain_fwd));
  m.impl("sandwich_norm_chain_bwd", TORCH_BOX(&sandwich_norm_chain_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
