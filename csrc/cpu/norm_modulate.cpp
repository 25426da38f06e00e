// CPU kernels of norm_modulate: a row is read once from memory, and again from the nearest cache.
#define LUMINA_FILE "cpu/norm_modulate.cpp"
#include "cpu/lib/norm.h"
#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {
namespace {

struct NormModulateFwd {
  Chunks chunks;
  Rows x, out;
  StatisticsRows statistics;
  Modulation modulation;
  float eps;
};

struct NormModulateBwd {
  Chunks chunks;
  Rows dout, x, dx;
  StatisticsRows statistics;
  Modulation modulation;
  ModulationGrads grads;
  Partials partials;
};

}  // namespace
}  // namespace lumina_kernels::cpu
#endif
#include "cpu/lib/levels.h"

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// out = ((x - mean) * rstd * weight + bias) * (1 + scale) + shift
void norm_modulate_fwd(const NormModulateFwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b;
  float *factor = scratch, *offset = scratch + op.chunks.width;
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    if (l == chunk.first || op.modulation.per_token) read(op.modulation, b, l, D, factor, offset);
    const Row x = op.x(b, l), out = op.out(b, l);
    const Statistics row = statistics(D, op.eps, op.statistics.layer,
                                      [&](auto i, auto count) { return load(x, i, count); });
    op.statistics.set(b, l, row);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec n = (load(x, i, count) - row.mean) * row.rstd;
      store(out, i, n * load(factor + i) + load(offset + i), count);
    });
  }
}

// With n = (x - mean) * rstd, d = dout * (1 + scale) * weight:
// dx = rstd * (d - mean(d) - n * mean(d * n)); partials: sums over the chunk's rows, modulate_bwd.
void norm_modulate_bwd(const NormModulateBwd& op, Chunk chunk, float* scratch) {
  const int64_t D = op.chunks.D, b = chunk.b;
  float *factor = scratch, *offset = scratch + op.chunks.width;
  ModulationRow row(op.modulation, op.grads, op.partials, chunk, factor);
  for (int64_t l = chunk.first; l < chunk.end; ++l) {
    if (l == chunk.first || op.modulation.per_token) read(op.modulation, b, l, D, factor, offset);
    row.move_to(op.modulation, op.grads, b, l);
    const Row dout = op.dout(b, l), x = op.x(b, l), dx = op.dx(b, l);
    const auto [mean, rstd] = op.statistics.get(b, l);
    const auto normed = [&, mean = mean, rstd = rstd](int64_t i, int64_t count) {
      return (load(x, i, count) - mean) * rstd;
    };
    NormBwd norm;
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec n = normed(i, count);
      norm.add(modulate_bwd(row, i, count, load(dout, i, count), n), n);
    });
    norm.finish(D, op.statistics.layer, rstd);
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec d = load(dout, i, count) * load(factor + i);
      store(dx, i, norm(d, normed(i, count)), count);
    });
  }
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor> norm_modulate_fwd(const Tensor& x, const OptionalTensor& weight,
                                             const OptionalTensor& bias,
                                             const OptionalTensor& scale,
                                             const OptionalTensor& shift, double eps,
                                             const std::string& kind) {
  Tensor out = empty_as(x);
  Tensor statistics = empty(x, {1 + (kind == "layer"), x.size(0), x.size(1)}, ScalarType::Float);
  if (x.numel() == 0) return {out, statistics};
  const NormModulateFwd op{.chunks = Chunks(x),
                           .x = rows_of(x),
                           .out = rows_of(out),
                           .statistics = StatisticsRows(statistics),
                           .modulation = Modulation(weight, bias, scale, shift),
                           .eps = static_cast<float>(eps)};
  parallel_chunks(op.chunks, 2, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(norm_modulate_fwd, op, chunk, scratch);
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_modulate_bwd(
    const Tensor& dout, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& statistics) {
  Tensor dx = empty_as(x);
  if (x.numel() == 0) {
    return {dx, zeros_as(weight, x), zeros_as(bias, x), zeros_as(scale, x), zeros_as(shift, x)};
  }
  const Chunks chunks(x);
  NormModulateBwd op{.chunks = chunks,
                     .dout = rows_of(dout),
                     .x = rows_of(x),
                     .dx = rows_of(dx),
                     .statistics = StatisticsRows(statistics),
                     .modulation = Modulation(weight, bias, scale, shift),
                     .grads = ModulationGrads(weight, bias, scale, shift, x),
                     .partials = Partials(x, chunks, ModulationGrads::kSums)};
  parallel_chunks(chunks, 2, [&](Chunk chunk, float* scratch) {
    LUMINA_CALL(norm_modulate_bwd, op, chunk, scratch);
  });
  parallel_columns(chunks.D, op.partials.work(), [&](int64_t begin, int64_t end) {
    LUMINA_CALL(finish, op.modulation, op.grads, op.partials, begin, end);
  });
  const auto& [dweight, dbias, dscale, dshift] = op.grads.tensors;
  return {dx, dweight, dbias, dscale, dshift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("norm_modulate_fwd", TORCH_BOX(&norm_modulate_fwd));
  m.impl("norm_modulate_bwd", TORCH_BOX(&norm_modulate_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
