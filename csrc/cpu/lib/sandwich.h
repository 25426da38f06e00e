// The gated residual of a normalised row, residual + tanh(gate) * n * weight, shared by two ops.
// Included twice, as norm.h is.
#include "cpu/lib/modulation.h"
#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

// tanh(gate) * weight, the factor of a sandwich norm.
struct Gate {
  Rows weight, gate;
  bool per_token;

  Gate(const Tensor& w, const Tensor& g)
      : weight(rows_of(w)), gate(rows_of(g)), per_token(is_per_token(g)) {}
};

struct GateGrads {
  Tensor dweight, dgate;
  Rows weight, gate;
  bool per_token;

  GateGrads(const Tensor& w, const Tensor& g)
      : dweight(empty_as(w)),
        dgate(empty_as(g)),
        weight(rows_of(dweight)),
        gate(rows_of(dgate)),
        per_token(is_per_token(g)) {}
};

}  // namespace lumina_kernels::cpu
#else
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// opening = tanh(gate) and factor = opening * weight of row (b, l).
inline void read(const Gate& g, int64_t b, int64_t l, int64_t D, float* opening, float* factor) {
  const Row weight = g.weight(b, l), gate = g.gate(b, l);
  for_vectors(D, [&](int64_t i, int64_t count) {
    const Vec t = tanh(load(gate, i, count));
    store(opening + i, t);
    store(factor + i, t * load(weight, i, count));
  });
}

// What sandwich_bwd needs of one row.
struct GateRow {
  float* sum;
  const float *opening, *factor;
  Row weight, dgate;  // dgate is null where a sample has one row

  GateRow(const Gate& gate, float* sum_, const float* opening_, const float* factor_, int64_t D)
      : sum(sum_), opening(opening_), factor(factor_), weight(gate.weight(0)) {
    clear(sum, D);
  }
};

// Returns the gradient of n from d, that of the output, and adds f * d * n to the sums over rows.
// If the gate has a row per token, f is tanh(gate), and the gradient of the gate is written.
// Otherwise f is 1, and the second stage applies the gate.
LUMINA_INLINE Vec sandwich_bwd(const GateRow& row, int64_t i, int64_t count, Vec d, Vec n) {
  Vec dn = d * n;
  if (row.dgate) {
    const Vec t = load(row.opening + i);
    store(row.dgate, i, (1.f - t * t) * dn * load(row.weight, i, count), count);
    dn *= t;
  }
  add(row.sum + i, dn);
  return d * load(row.factor + i);
}

// From the sums S of d * n over a sample's rows: dgate = (1 - tanh(gate)²) * weight * S and
// dweight = sum_b tanh(gate) * S; if the gate has a row per token, S has that factor already.
inline void finish(const Gate& g, const GateGrads& grads, const Partials& partials, int64_t sum,
                   int64_t begin, int64_t end) {
  for_vectors(end - begin, [&](int64_t column, int64_t count) {
    const int64_t i = begin + column;
    Vec dweight{};
    for (int64_t b = 0; b < partials.B; ++b) {
      Vec S = total(partials, b, sum, i);
      if (!grads.per_token) {
        const Vec t = tanh(load(g.gate(b), i, count)), w = load(g.weight(0), i, count);
        store(grads.gate(b), i, (1.f - t * t) * w * S, count);
        S *= t;
      }
      dweight += S;
    }
    store(grads.weight(0), i, dweight, count);
  });
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif
