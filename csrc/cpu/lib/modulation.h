// The modulation of a norm, (n * weight + bias) * (1 + scale) + shift, shared by three ops.
// Included twice, as norm.h is.
#include "cpu/lib/norm.h"
#ifndef LUMINA_LEVEL
#include <array>

namespace lumina_kernels::cpu {

struct Modulation {
  Rows weight, bias, scale, shift;  // null where missing
  bool per_token;                   // scale or shift has a row for each token

  Modulation(const OptionalTensor& w, const OptionalTensor& b, const OptionalTensor& scale_,
             const OptionalTensor& shift_)
      : weight(rows_of(w)),
        bias(rows_of(b)),
        scale(rows_of(scale_)),
        shift(rows_of(shift_)),
        per_token(is_per_token(scale_) || is_per_token(shift_)) {}
};

// The gradients of a Modulation's four tensors.
struct ModulationGrads {
  enum Sum { kNormed, kOne, kShift, kSums };  // over f * d * n, f * d and d, see modulate_bwd
  std::array<Tensor, 4> tensors;              // `nothing` where the parameter is missing
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
    return sample_shift && scale_per_token;  // in this case kOne has the factor 1 + scale
  }
};

}  // namespace lumina_kernels::cpu
#else
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

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

// Returns the gradient of n from d, that of the modulated norm. Adds f * d * n and f * d to the
// sums over rows, and writes the gradients of modulations that have a row per token. f is 1 + scale
// if scale is one of these; otherwise it is 1, and the second stage applies scale.
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

// From the sums A of f * d * n and E of f * d over a sample's rows: dscale = A * weight + E * bias,
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

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif
