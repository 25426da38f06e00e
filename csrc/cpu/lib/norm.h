// What the norms over rows (B, L, D) share. Included before levels.h, for what does not depend on
// the instruction set, and again inside every level, for the functions over one row.
#ifndef LUMINA_LEVEL
#include <array>

#include "cpu/lib/chunks.h"

namespace lumina_kernels::cpu {

// Value l of row b of a float32 tensor.
inline float* float_at(const Rows& rows, int64_t b, int64_t l) {
  return reinterpret_cast<float*>(rows(b).data) + l;
}

struct Statistics {
  float mean, rstd;
};

// The float32 tensor of statistics (1 or 2, B, L): rstd and, of a LayerNorm, the mean.
struct StatisticsRows {
  Rows rows;
  bool layer;

  explicit StatisticsRows(const Tensor& tensor)
      : rows(rows_of(tensor)), layer(tensor.size(0) == 2) {}

  float* at(int64_t i, int64_t b, int64_t l) const {
    return reinterpret_cast<float*>(rows(i, b).data) + l;
  }
  void set(int64_t b, int64_t l, Statistics value) const {
    *at(0, b, l) = value.rstd;
    if (layer) *at(1, b, l) = value.mean;
  }
  Statistics get(int64_t b, int64_t l) const { return {layer ? *at(1, b, l) : 0.f, *at(0, b, l)}; }
};

// Of (n * weight + bias) * (1 + scale) + shift.
struct Modulation {
  Rows weight, bias, scale, shift;  // null where there is none
  bool per_token;

  Modulation(const OptionalTensor& w, const OptionalTensor& b, const OptionalTensor& scale_,
             const OptionalTensor& shift_)
      : weight(rows_of(w)),
        bias(rows_of(b)),
        scale(rows_of(scale_)),
        shift(rows_of(shift_)),
        per_token(is_per_token(scale_) || is_per_token(shift_)) {}
};

// Of a Modulation's four tensors.
struct ModulationGrads {
  enum Sum { kNormed, kOne, kShift, kSums };  // of f * d * n, f * d and d, see modulate_bwd
  std::array<Tensor, 4> tensors;              // empty where there is no such parameter
  Rows weight, bias, scale, shift;            // of these tensors
  bool scale_per_token, shift_per_token;

  ModulationGrads(const OptionalTensor& w, const OptionalTensor& b, const OptionalTensor& scale_,
                  const OptionalTensor& shift_, const Tensor& like)
      : scale_per_token(is_per_token(scale_)), shift_per_token(is_per_token(shift_)) {
    Rows* const rows[] = {&weight, &bias, &scale, &shift};
    const OptionalTensor* const parameters[] = {&w, &b, &scale_, &shift_};
    for (int i = 0; i < 4; ++i) {
      tensors[i] = empty_as(*parameters[i], like);
      if (*parameters[i]) *rows[i] = rows_of(tensors[i]);
    }
  }

  bool needs(Sum sum) const {
    const bool sample_scale = scale && !scale_per_token, sample_shift = shift && !shift_per_token;
    if (sum == kNormed) return weight || sample_scale;
    if (sum == kOne) return bias || sample_scale || (sample_shift && !scale_per_token);
    return sample_shift && scale_per_token;  // there kOne has the factor 1 + scale
  }
};

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

// The first `count` values, 0 for the others.
LUMINA_INLINE Vec keep(Vec value, int64_t count) {
  if (count >= kWidth) return value;
  IntVec lane{};
  for (int i = 0; i < LUMINA_WIDTH; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count) ? value : Vec{};
}

LUMINA_INLINE void add(float* sum, Vec value) { store(sum, load(sum) + value); }

inline void clear(float* values, int64_t D) {
  for_vectors(D, [&](int64_t i, int64_t) { store(values + i, Vec{}); });
}

// Sum of the vectors f(i, count), in four chains: one would wait for its last addition.
template <class F>
LUMINA_INLINE float row_sum(int64_t D, const F& f) {
  Vec a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * kWidth <= D; i += 4 * kWidth) {
    a += f(i, kWidth);
    b += f(i + kWidth, kWidth);
    c += f(i + 2 * kWidth, kWidth);
    d += f(i + 3 * kWidth, kWidth);
  }
  for (; i + kWidth <= D; i += kWidth) a += f(i, kWidth);
  if (i < D) b += f(i, D - i);
  return sum((a + b) + (c + d));
}

// 1 / sqrt(mean(x²) + eps)
template <class F>
LUMINA_INLINE float rms_rstd(int64_t D, float eps, const F& x) {
  const float squares = row_sum(D, [&](int64_t i, int64_t count) {
    const Vec value = x(i, count);
    return value * value;
  });
  return 1.f / std::sqrt(squares / D + eps);
}

// Of the vectors x(i, count), which are 0 beyond count.
template <class F>
LUMINA_INLINE Statistics statistics(int64_t D, float eps, bool layer, const F& x) {
  if (!layer) return {0.f, rms_rstd(D, eps, x)};
  const float mean = row_sum(D, x) / D;
  return {mean, rms_rstd(D, eps, [&](int64_t i, int64_t count) {
            return keep(x(i, count) - mean, count);
          })};
}

// Gradient of a norm's input, rstd * (d - mean(d) - n * mean(d * n)), from d, that of its output n;
// an RMS norm has no mean(d). Of one row, of which add(d, n) is called for all vectors first.
struct NormBwd {
  Vec d_sum{}, dn_sum{};
  float d_mean = 0.f, dn_mean = 0.f, rstd = 0.f;

  LUMINA_INLINE void add(Vec d, Vec n) {
    d_sum += d;
    dn_sum += d * n;
  }
  LUMINA_INLINE void finish(int64_t D, bool layer, float rstd_) {
    d_mean = layer ? sum(d_sum) / D : 0.f;
    dn_mean = sum(dn_sum) / D;
    rstd = rstd_;
  }
  LUMINA_INLINE Vec operator()(Vec d, Vec n) const { return rstd * (d - d_mean - n * dn_mean); }
};

// ---- modulation ----

// (n * weight + bias) * (1 + scale) + shift of row (b, l) as n * factor + offset.
inline void read(const Modulation& m, int64_t b, int64_t l, int64_t D, float* factor,
                 float* offset) {
  const Row weight = m.weight(b, l), bias = m.bias(b, l), scale = m.scale(b, l);
  const Row shift = m.shift(b, l);
  for_vectors(D, [&](int64_t i, int64_t count) {
    const Vec s = 1.f + (scale ? load(scale, i, count) : Vec{});
    const Vec c = (bias ? load(bias, i, count) : Vec{}) * s;
    store(factor + i, weight ? load(weight, i, count) * s : s);
    store(offset + i, shift ? load(shift, i, count) + c : c);
  });
}

// What modulate_bwd needs of one row.
struct ModulationRow {
  const float* factor;
  Row weight, bias, scale, dscale, dshift;
  float *normed_sum, *one_sum, *shift_sum;

  ModulationRow(const Modulation& m, const ModulationGrads& grads, const Partials& partials,
                Chunk chunk, const float* factor_)
      : factor(factor_) {
    const auto sum = [&](ModulationGrads::Sum i) {
      float* values = grads.needs(i) ? partials(chunk.b, chunk.index, i) : nullptr;
      if (values) clear(values, partials.width);
      return values;
    };
    normed_sum = sum(ModulationGrads::kNormed);
    one_sum = sum(ModulationGrads::kOne);
    shift_sum = sum(ModulationGrads::kShift);
    weight = m.weight(chunk.b), bias = m.bias(chunk.b);
  }

  void move_to(const Modulation& m, const ModulationGrads& grads, int64_t b, int64_t l) {
    if (grads.scale_per_token) scale = m.scale(b, l), dscale = grads.scale(b, l);
    if (grads.shift_per_token) dshift = grads.shift(b, l);
  }
};

// Gradient of n from that of the modulated norm, d; adds to the sums over rows of f * d * n and
// f * d, and writes the gradients of modulations with a row per token. f is 1 + scale where scale
// is one of these, else 1: then the second stage knows scale.
LUMINA_INLINE Vec modulate_bwd(const ModulationRow& row, int64_t i, int64_t count, Vec d, Vec n) {
  Vec f = d;
  if (row.dscale) {
    Vec modulated = row.weight ? n * load(row.weight, i, count) : n;
    if (row.bias) modulated += load(row.bias, i, count);
    store(row.dscale, i, d * modulated, count);
    f = d * (1.f + load(row.scale, i, count));
  }
  if (row.normed_sum) add(row.normed_sum + i, f * n);
  if (row.one_sum) add(row.one_sum + i, f);
  if (row.shift_sum) add(row.shift_sum + i, d);
  if (row.dshift) store(row.dshift, i, d, count);
  return d * load(row.factor + i);
}

LUMINA_INLINE Vec total(const Partials& partials, int64_t b, int64_t sum, int64_t i) {
  Vec result{};
  for (int64_t chunk = 0; chunk < partials.chunks; ++chunk)
    result += load(partials(b, chunk, sum) + i);
  return result;
}

// Of the sums A of f * d * n and E of f * d over a sample's rows: dscale = A * weight + E * bias,
// dshift = E, dweight = sum_b (1 + scale) * A, dbias = sum_b (1 + scale) * E.
inline void finish(const Modulation& m, const ModulationGrads& grads, const Partials& partials,
                   int64_t begin, int64_t end) {
  const bool sample_scale = grads.scale && !grads.scale_per_token;
  const bool sample_shift = grads.shift && !grads.shift_per_token;
  const Row weight = m.weight(0), bias = m.bias(0);
  const auto needed = [&](int64_t b, ModulationGrads::Sum sum, int64_t i) {
    return grads.needs(sum) ? total(partials, b, sum, i) : Vec{};
  };
  for_vectors(end - begin, [&](int64_t column, int64_t count) {
    const int64_t i = begin + column;
    Vec dweight{}, dbias{};
    for (int64_t b = 0; b < partials.B; ++b) {
      Vec A = needed(b, ModulationGrads::kNormed, i), E = needed(b, ModulationGrads::kOne, i);
      if (sample_shift) {
        const Vec dshift = grads.scale_per_token ? needed(b, ModulationGrads::kShift, i) : E;
        store(grads.shift(b), i, dshift, count);
      }
      if (sample_scale) {
        Vec dscale = weight ? A * load(weight, i, count) : A;
        if (bias) dscale += E * load(bias, i, count);
        store(grads.scale(b), i, dscale, count);
        const Vec f = 1.f + load(m.scale(b), i, count);
        A *= f, E *= f;
      }
      dweight += A, dbias += E;
    }
    if (grads.weight) store(grads.weight(0), i, dweight, count);
    if (grads.bias) store(grads.bias(0), i, dbias, count);
  });
}

// ---- gate ----

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

// Gradient of n = y * rstd from that of the output, d; adds to the sums over rows of f * d * n. f
// is tanh(gate) where `gate` has a row per token: then its gradient is written. Else f is 1, and
// the second stage knows the gate.
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

// Of the sums S of d * n over a sample's rows: dgate = (1 - tanh(gate)²) * weight * S, dweight =
// sum_b tanh(gate) * S; where `gate` has a row per token, S has that factor.
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
