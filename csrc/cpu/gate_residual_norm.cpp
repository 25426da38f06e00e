// CPU kernels of gate_residual_norm: a row stays in the L1 cache from the sum to the norm.
#define LUMINA_FILE "cpu/gate_residual_norm.cpp"
#include "cpu/lib/modulation.h"
#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {
namespace {

struct GateResidualNormFwd {
  Chunks chunks;
  Rows y, residual, new_residual, normed;
  Rows gate;  // null where missing
  StatisticsRows statistics;
  Modulation modulation;
  bool gate_per_token;
  float eps;
};

struct GateResidualNormBwd {
  Chunks chunks;
  Rows dnew_residual, dnormed, y, residual, dy, dresidual;
  Rows gate, dgate;  // null where missing
  StatisticsRows statistics;
  Modulation modulation;
  ModulationGrads grads;
  Partials partials;
  bool gate_per_token;
};

constexpr int64_t kGateSum = ModulationGrads::kSums;

}  // namespace
}  // namespace lumina_kernels::cpu
#endif
#include "cpu/lib/levels.h"

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// The gate, 1 where it is missing.
inline void read(Row gate, int64_t D, float* values) {
  for_vectors(D, [&](int64_t i, int64_t count) {
    store(values + i, gate ? load(gate, i, count) : broadcast(1.f));
  });
}

// new_residual = residual + gate * y,
// normed = (norm(new_residual) * weight + bias) * (1 + scale) + shift
void gate_residual_norm_fwd(const GateResidualNormFwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b, width = op.chunks.width;
  float *gate = scratch, *factor = gate + width, *offset = factor + width, *values = offset + width;
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    if (chunk.changes_at(l, op.gate_per_token)) read(op.gate(b, l), D, gate);
    if (chunk.changes_at(l, op.modulation.per_token)) read(op.modulation, b, l, D, factor, offset);
    const Row y = op.y(b, l), residual = op.residual(b, l);
    const Row new_residual = op.new_residual(b, l), normed = op.normed(b, l);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec value = load(residual, i, count) + load(gate + i) * load(y, i, count);
      store(values + i, value);
      store(new_residual, i, value, count);
    });
    const Statistics row = statistics(D, op.eps, op.statistics.layer,
                                      [&](int64_t i, int64_t) { return load(values + i); });
    op.statistics.set(b, l, row);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec n = (load(values + i) - row.mean) * row.rstd;
      store(normed, i, n * load(factor + i) + load(offset + i), count);
    });
  }
}

// dresidual is dnew_residual plus the gradient of the norm's input, and dy = gate * dresidual. Rows
// of new_residual are recomputed: what the forward wrote was rounded. partials: the sums of
// modulate_bwd over the chunk's rows, and that of dresidual * y, which is dgate.
void gate_residual_norm_bwd(const GateResidualNormBwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b, width = op.chunks.width;
  float *gate = scratch, *factor = gate + width, *offset = factor + width, *values = offset + width;
  ModulationRow row(op.modulation, op.grads, op.partials, chunk, factor);
  const bool has_gate = bool(op.gate);
  float* gate_sum = op.partials(b, chunk.index, kGateSum);
  clear(gate_sum, D);
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    if (chunk.changes_at(l, op.gate_per_token)) read(op.gate(b, l), D, gate);
    if (chunk.changes_at(l, op.modulation.per_token)) read(op.modulation, b, l, D, factor, offset);
    row.move_to(op.modulation, op.grads, b, l);
    const Row dnew_residual = op.dnew_residual(b, l), dnormed = op.dnormed(b, l), y = op.y(b, l);
    const Row residual = op.residual(b, l), dy = op.dy(b, l), dresidual = op.dresidual(b, l);
    const Row dgate = op.gate_per_token ? op.dgate(b, l) : Row{};
    const auto [mean, rstd] = op.statistics.get(b, l);
    const auto gradient = [&, mean = mean, rstd = rstd](int64_t i, int64_t count) -> NormGradient {
      const Vec new_residual = load(residual, i, count) + load(gate + i) * load(y, i, count);
      const Vec n = (new_residual - mean) * rstd;
      store(values + i, n);
      return {modulate_bwd(row, i, count, load(dnormed, i, count), n), n};
    };
    const NormBwd norm = norm_bwd_means(D, op.statistics.layer, rstd, gradient);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec dn = load(dnormed, i, count) * load(factor + i);
      const Vec d = load(dnew_residual, i, count) + norm(dn, load(values + i));
      store(dresidual, i, d, count);
      store(dy, i, load(gate + i) * d, count);
      if (!has_gate) return;
      const Vec product = d * load(y, i, count);
      if (dgate) {
        store(dgate, i, product, count);
      } else {
        add(gate_sum + i, product);
      }
    });
  }
}

// dgate, if it has one row per sample, from the sums over the chunks.
inline void finish_gate(const GateResidualNormBwd& op, int64_t begin, int64_t end) {
  for_vectors(end - begin, [&](int64_t column, int64_t count) {
    const int64_t i = begin + column;
    for (int64_t b = 0; b < op.chunks.B; ++b)
      store(op.dgate(b), i, total(op.partials, b, kGateSum, i), count);
  });
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> gate_residual_norm_fwd(
    const Tensor& y, const Tensor& residual, const OptionalTensor& gate,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift, double eps, const std::string& kind) {
  Tensor new_residual = empty_as(residual), normed = empty_as(residual);
  Tensor statistics = empty(y, {1 + (kind == "layer"), y.size(0), y.size(1)}, ScalarType::Float);
  if (y.numel() == 0) return {new_residual, normed, statistics};
  const GateResidualNormFwd op{.chunks = Chunks(y),
                               .y = rows_of(y),
                               .residual = rows_of(residual),
                               .new_residual = rows_of(new_residual),
                               .normed = rows_of(normed),
                               .gate = rows_of(gate),
                               .statistics = StatisticsRows(statistics),
                               .modulation = Modulation(weight, bias, scale, shift),
                               .gate_per_token = is_per_token(gate),
                               .eps = static_cast<float>(eps)};
  parallel_chunks(op.chunks, 4, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(gate_residual_norm_fwd, op, chunk, scratch);
  });
  return {new_residual, normed, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_norm_bwd(
    const Tensor& dnew_residual, const Tensor& dnormed, const Tensor& y, const Tensor& residual,
    const OptionalTensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& statistics) {
  Tensor dy = empty_as(y), dresidual = empty_as(residual);
  if (y.numel() == 0) {
    return {dy,
            dresidual,
            zeros_as(gate, y),
            zeros_as(weight, y),
            zeros_as(bias, y),
            zeros_as(scale, y),
            zeros_as(shift, y)};
  }
  Tensor dgate = empty_as(gate, y);
  const Chunks chunks(y);
  const GateResidualNormBwd op{.chunks = chunks,
                               .dnew_residual = rows_of(dnew_residual),
                               .dnormed = rows_of(dnormed),
                               .y = rows_of(y),
                               .residual = rows_of(residual),
                               .dy = rows_of(dy),
                               .dresidual = rows_of(dresidual),
                               .gate = rows_of(gate),
                               .dgate = gate ? rows_of(dgate) : Rows{},
                               .statistics = StatisticsRows(statistics),
                               .modulation = Modulation(weight, bias, scale, shift),
                               .grads = ModulationGrads(weight, bias, scale, shift, y),
                               .partials = Partials(y, chunks, kGateSum + 1),
                               .gate_per_token = is_per_token(gate)};
  parallel_chunks(chunks, 4, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(gate_residual_norm_bwd, op, chunk, scratch);
  });
  parallel_columns(chunks.D, op.partials.work(), [&](int64_t begin, int64_t end) {
    LUMINA_CALL(finish, op.modulation, op.grads, op.partials, begin, end);
    if (op.gate && !op.gate_per_token) LUMINA_CALL(finish_gate, op, begin, end);
  });
  const auto& [dweight, dbias, dscale, dshift] = op.grads.tensors;
  return {dy, dresidual, dgate, dweight, dbias, dscale, dshift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("gate_residual_norm_fwd", TORCH_BOX(&gate_residual_norm_fwd));
  m.impl("gate_residual_norm_bwd", TORCH_BOX(&gate_residual_norm_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
