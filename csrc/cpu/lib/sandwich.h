// The gated residual of a normalised row, residual + tanh(gate) * n * weight, shared by two ops.
// Included twice, as norm.h is.
#include "cpu/lib/modulation.h"
#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

// tanh(gate) * weight, the factor of a sandwich norm; without `tanh` the gate as it is.
struct Gate {
  Rows weight, gate;  // null where missing
  bool per_token, tanh;

  Gate(const OptionalTensor& w, const OptionalTensor& g, bool tanh_)
      : weight(rows_of(w)), gate(rows_of(g)), per_token(is_per_token(g)), tanh(tanh_) {}
};

struct GateGrads {
  Tensor dweight, dgate;  // `nothing` where the parameter is missing
  Rows weight, gate;      // of these tensors
  bool per_token;

  GateGrads(const OptionalTensor& w, const OptionalTensor& g, const Tensor& like)
      : dweight(empty_as(w, like)), dgate(empty_as(g, like)), per_token(is_per_token(g)) {
    if (w) weight = rows_of(dweight);
    if (g) gate = rows_of(dgate);
  }

  // Whether the gradient of a parameter is a sum over rows.
  bool needs_sum() const { return weight || (gate && !per_token); }
};

}  // namespace lumina_kernels::cpu
#else
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// opening = tanh(gate) and factor = opening * weight of row (b, l).
inline void read(const Gate& g, int64_t b, int64_t l, int64_t D, float* opening, float* factor) {
  const Row weight = g.weight(b, l), gate = g.gate(b, l);
  const auto fill = [&](const auto& opening_at) {
    for_vectors(D, [&](int64_t i, int64_t count) {
      const Vec t = opening_at(i, count);
      store(opening + i, t);
      store(factor + i, weight ? t * load(weight, i, count) : t);
    });
  };
  if (!gate) {
    fill([](int64_t, int64_t) { return broadcast(1.f); });
  } else if (g.tanh) {
    fill([&](int64_t i, int64_t count) { return tanh(load(gate, i, count)); });
  } else {
    fill([&](int64_t i, int64_t count) { return load(gate, i, count); });
  }
}

// What sandwich_bwd needs of one row.
struct GateRow {
  float* sum;
  const float *opening, *factor;
  Row weight, dgate;  // dgate is null where a sample has one row
  bool tanh;

  GateRow(const Gate& gate, float* sum_, const float* opening_, const float* factor_, int64_t D)
      : sum(sum_), opening(opening_), factor(factor_), weight(gate.weight(0)), tanh(gate.tanh) {
    clear(sum, D);
  }
};

// Returns the gradient of n from d, that of the output, and adds f * d * n to the sums over rows.
// If the gate has a row per token, f is tanh(gate), or the gate as it is, and the gradient of the
// gate is written. Otherwise f is 1, and the second stage applies the gate.
LUMINA_INLINE Vec sandwich_bwd(const GateRow& row, int64_t i, int64_t count, Vec d, Vec n) {
  Vec dn = d * n;
  if (row.dgate) {
    const Vec t = load(row.opening + i);
    Vec dgate = row.tanh ? (1.f - t * t) * dn : dn;
    if (row.weight) dgate *= load(row.weight, i, count);
    store(row.dgate, i, dgate, count);
    dn *= t;
  }
  add(row.sum + i, dn);
  return d * load(row.factor + i);
}

// From the sums S of d * n over a sample's rows: dgate = (1 - tanh(gate)²) * weight * S and
// dweight = sum_b tanh(gate) * S (without `tanh` dgate = weight * S, dweight = sum_b gate * S); if
// the gate has a row per token, S has that factor already.
inline void finish(const Gate& g, const GateGrads& grads, const Partials& partials, int64_t sum,
                   int64_t begin, int64_t end) {
  if (!grads.needs_sum()) return;
  const bool per_sample = grads.gate && !grads.per_token;
  for_vectors(end - begin, [&](int64_t column, int64_t count) {
    const int64_t i = begin + column;
    Vec dweight{};
    for (int64_t b = 0; b < partials.B; ++b) {
      const Vec S = total(partials, b, sum, i);
      if (per_sample) {
        Vec t = load(g.gate(b), i, count), slope = broadcast(1.f);
        if (g.tanh) t = tanh(t), slope = 1.f - t * t;
        if (g.weight) slope *= load(g.weight(0), i, count);
        store(grads.gate(b), i, slope * S, count);
        dweight += S * t;
      } else {
        dweight += S;
      }
    }
    if (grads.weight) store(grads.weight(0), i, dweight, count);
  });
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif
