// CPU kernels of gate_residual_norm: a row stays in the nearest cache from the sum to the norm.
#define LUMINA_FILE "gate_residual_norm.cpp"
#include "norm.h"
#ifndef LUMINA_LEVEL
namespace lumina_kernels {
namespace {

struct GateResidualNormFwd {
  Chunks chunks;
  Rows y, residual, gate, new_, normed;
  StatisticsRows statistics;
  Modulation modulation;
  bool gate_per_token;
  float eps;
};

struct GateResidualNormBwd {
  Chunks chunks;
  Rows dnew, dnormed, y, residual, gate, dy, dresidual, dgate;
  StatisticsRows statistics;
  Modulation modulation;
  ModulationGrads grads;
  Partials partials;
  bool gate_per_token;
};

constexpr int64_t kGateSum = ModulationGrads::kSums;

}  // namespace
}  // namespace lumina_kernels
#endif
#include "levels.h"

#ifdef LUMINA_LEVEL
namespace lumina_kernels::LUMINA_LEVEL {
namespace {

inline void read(Row row, int64_t D, float* values) {
  for_vectors(D, [&](int64_t i, int64_t count) { store(values + i, load(row, i, count)); });
}

// new = residual + gate * y, normed = (norm(new) * weight + bias) * (1 + scale) + shift
void gate_residual_norm_fwd(const GateResidualNormFwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b, width = op.chunks.width;
  float *gate = scratch, *factor = gate + width, *offset = factor + width, *values = offset + width;
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    const bool first = l == chunk.first;
    if (first || op.gate_per_token) read(op.gate(b, l), D, gate);
    if (first || op.modulation.per_token) read(op.modulation, b, l, D, factor, offset);
    const Row y = op.y(b, l), residual = op.residual(b, l);
    const Row new_ = op.new_(b, l), normed = op.normed(b, l);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec value = load(residual, i, count) + load(gate + i) * load(y, i, count);
      store(values + i, value);
      store(new_, i, value, count);
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

// dresidual = dnew + that of the norm's input, dy = gate * dresidual; `new` is computed again
// rather than read rounded. partials: sums over the chunk's rows, modulate_bwd, and of
// dresidual * y, which is dgate.
void gate_residual_norm_bwd(const GateResidualNormBwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b, width = op.chunks.width;
  float *gate = scratch, *factor = gate + width, *offset = factor + width, *values = offset + width;
  ModulationRow row(op.modulation, op.grads, op.partials, chunk, factor);
  float* gate_sum = op.partials(b, chunk.index, kGateSum);
  clear(gate_sum, D);
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    const bool first = l == chunk.first;
    if (first || op.gate_per_token) read(op.gate(b, l), D, gate);
    if (first || op.modulation.per_token) read(op.modulation, b, l, D, factor, offset);
    row.move_to(op.modulation, op.grads, b, l);
    const Row dnew = op.dnew(b, l), dnormed = op.dnormed(b, l), y = op.y(b, l);
    const Row residual = op.residual(b, l), dy = op.dy(b, l), dresidual = op.dresidual(b, l);
    const Row dgate = op.gate_per_token ? op.dgate(b, l) : Row{};
    const auto [mean, rstd] = op.statistics.get(b, l);
    NormBwd norm;
    for_vectors(D, [&, mean = mean, rstd = rstd](int64_t i, int64_t count) {
      const Vec new_ = load(residual, i, count) + load(gate + i) * load(y, i, count);
      const Vec n = (new_ - mean) * rstd;
      store(values + i, n);
      norm.add(modulate_bwd(row, i, count, load(dnormed, i, count), n), n);
    });
    norm.finish(D, op.statistics.layer, rstd);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec dn = load(dnormed, i, count) * load(factor + i);
      const Vec d = load(dnew, i, count) + norm(dn, load(values + i));
      store(dresidual, i, d, count);
      store(dy, i, load(gate + i) * d, count);
      const Vec product = d * load(y, i, count);
      if (dgate) {
        store(dgate, i, product, count);
      } else {
        add(gate_sum + i, product);
      }
    });
  }
}

// dgate, of one row per sample, from the sums over the chunks.
inline void finish_gate(const GateResidualNormBwd& op, int64_t begin, int64_t end) {
  for_vectors(end - begin, [&](int64_t column, int64_t count) {
    const int64_t i = begin + column;
    for (int64_t b = 0; b < op.chunks.B; ++b)
      store(op.dgate(b), i, total(op.partials, b, kGateSum, i), count);
  });
}

}  // namespace
}  // namespace lumina_kernels::LUMINA_LEVEL
#else
namespace lumina_kernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> gate_residual_norm_fwd(
    const Tensor& y, const Tensor& residual, const Tensor& gate, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
    double eps, const std::string& kind) {
  Tensor new_ = empty_as(residual), normed = empty_as(residual);
  Tensor statistics = empty(y, {1 + (kind == "layer"), y.size(0), y.size(1)}, ScalarType::Float);
  if (y.numel() == 0) return {new_, normed, statistics};
  const GateResidualNormFwd op{Chunks(y),
                               rows_of(y),
                               rows_of(residual),
                               rows_of(gate),
                               rows_of(new_),
                               rows_of(normed),
                               StatisticsRows(statistics),
                               Modulation(weight, bias, scale, shift),
                               is_per_token(gate),
                               static_cast<float>(eps)};
  parallel_chunks(op.chunks, 4, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(gate_residual_norm_fwd, op, chunk, scratch);
  });
  return {new_, normed, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_norm_bwd(
    const Tensor& dnew, const Tensor& dnormed, const Tensor& y, const Tensor& residual,
    const Tensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& statistics) {
  Tensor dy = empty_as(y), dresidual = empty_as(residual);
  if (y.numel() == 0) {
    return {dy,
            dresidual,
            zeros_as(gate),
            zeros_as(weight, y),
            zeros_as(bias, y),
            zeros_as(scale, y),
            zeros_as(shift, y)};
  }
  Tensor dgate = empty_as(gate);
  const Chunks chunks(y);
  const GateResidualNormBwd op{chunks,
                               rows_of(dnew),
                               rows_of(dnormed),
                               rows_of(y),
                               rows_of(residual),
                               rows_of(gate),
                               rows_of(dy),
                               rows_of(dresidual),
                               rows_of(dgate),
                               StatisticsRows(statistics),
                               Modulation(weight, bias, scale, shift),
                               ModulationGrads(weight, bias, scale, shift, y),
                               Partials(y, chunks, kGateSum + 1),
                               is_per_token(gate)};
  parallel_chunks(chunks, 4, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(gate_residual_norm_bwd, op, chunk, scratch);
  });
  parallel_columns(chunks.D, op.partials.work(), [&](int64_t begin, int64_t end) {
    LUMINA_CALL(finish, op.modulation, op.grads, op.partials, begin, end);
    if (!op.gate_per_token) LUMINA_CALL(finish_gate, op, begin, end);
  });
  const auto& [dweight, dbias, dscale, dshift] = op.grads.tensors;
  return {dy, dresidual, dgate, dweight, dbias, dscale, dshift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("gate_residual_norm_fwd", TORCH_BOX(&gate_residual_norm_fwd));
  m.impl("gate_residual_norm_bwd", TORCH_BOX(&gate_residual_norm_bwd));
}

}  // namespace lumina_kernels
#endif
