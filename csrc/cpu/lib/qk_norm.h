// Shared by the ops that normalise queries and keys. Included before levels.h, as rope.h is.
#include "cpu/lib/window.h"

#ifndef LUMINA_QK_NORM_ROPE3D
#define LUMINA_QK_NORM_ROPE3D
namespace lumina_kernels::cpu {

struct Norm {
  bool layer, per_head;  // LayerNorm or RMSNorm; over each head or over all of a token
  float eps;

  Norm(const std::string& name, double eps_)
      : layer(name == "layer_across_heads"),
        per_head(name == "rms_per_head"),
        eps(static_cast<float>(eps_)) {}
};

// A weight or bias in float32, repeated `times` times and padded; empty for None.
std::vector<float> spread(const OptionalTensor& parameter, int64_t times);

// q or k, and its parameters repeated for all heads.
struct Normed {
  Rows x;
  int64_t heads;
  std::vector<float> weights, biases;

  Normed(const Tensor& tensor, const OptionalTensor& weight, const OptionalTensor& bias, Norm norm)
      : x(rows_of(tensor)),
        heads(tensor.size(2)),
        weights(spread(weight, norm.per_head ? heads : 1)),
        biases(spread(bias, 1)) {}

  const float* weight() const { return weights.empty() ? nullptr : weights.data(); }
  const float* bias() const { return biases.empty() ? nullptr : biases.data(); }
};

// The windows of a k that was averaged: its gradient comes as one of means over them.
struct Pool {
  Windows windows;
  Mask mask;
  const float* counts;
};

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// dq, dk and the gradients of the four parameters, empty for None. The rotation that is undone is
// one by angles or by tables; the other is null.
SixTensors qk_norm_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k,
                       const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                       const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                       const Angles* angles, const RotaryTables* tables, Norm norm,
                       const Pool* pool);

}  // namespace lumina_kernels::cpu
#endif  // LUMINA_QK_NORM_ROPE3D

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {

// The first `count` values of a, followed by those of b.
LUMINA_INLINE Vec first(int64_t count, Vec a, Vec b) {
  if (count >= kWidth) return a;
  IntVec lane;
  for (int i = 0; i < LUMINA_WIDTH; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count) ? a : b;
}

// The sum of the vectors f(i) over [0, length); values of the last one beyond it do not count.
template <class F>
LUMINA_INLINE float total(int64_t length, const F& f) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= length; i += 4 * kWidth)
    for (int n = 0; n < 4; ++n) sums[n] += f(i + n * kWidth);
  for (; i + kWidth <= length; i += kWidth) sums[0] += f(i);
  if (i < length) sums[1] += first(length - i, f(i), Vec{});
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct Moments {
  float mean, rstd;  // the mean is 0 for an RMSNorm
};

LUMINA_INLINE Moments moments_of(const float* row, int64_t length, Norm norm) {
  const float size = static_cast<float>(length);
  const float mean =
      norm.layer ? total(length, [&](int64_t i) { return load(row + i); }) / size : 0.f;
  const float squares = total(length, [&](int64_t i) {
    const Vec centred = load(row + i) - mean;
    return centred * centred;
  });
  return {mean, 1.f / std::sqrt(squares / size + norm.eps)};
}

// The heads of a token in float32 without gaps: where they lie, if all vectors of `length` values
// are whole ones there, or in `row`.
LUMINA_INLINE const float* staged(const TokenHeads& x, int64_t length, float* row) {
  if (x.count == 1 && x.row.dtype == Dtype::kFloat && length % kWidth == 0)
    return reinterpret_cast<const float*>(x.row.data);
  stage(x, row);
  return row;
}

// row = norm(x) * weight + bias, for the padded token
LUMINA_INLINE void norm_row(const TokenHeads& x, const float* weight, const float* bias, Norm norm,
                            int64_t K, float* row) {
  stage(x, row);
  const int64_t size = x.size(), length = norm.per_head ? K : size;
  for (int64_t at = 0; at < size; at += length) {
    const auto [mean, rstd] = moments_of(row + at, length, norm);
    for_vectors(length, [&, mean = mean, rstd = rstd](int64_t i, int64_t count) {
      i += at;
      const Vec raw = load(row + i);
      Vec y = (raw - mean) * rstd;
      if (weight != nullptr) y = y * load(weight + i);
      if (bias != nullptr) y = y + load(bias + i);
      store(row + i, first(count, y, raw));
    });
  }
}

// out = rotate(norm(x) * weight + bias); `row` is a buffer for the padded token
LUMINA_INLINE void norm_rotate(const TokenHeads& x, const float* weight, const float* bias,
                               Norm norm, Rotation rotation, int64_t K, Row out, float* row) {
  const int64_t size = x.size(), length = norm.per_head ? K : size;
  const float* raw = staged(x, length, row);
  for (int64_t at = 0; at < size; at += length) {
    const float* part = raw + at;
    const auto [mean, rstd] = moments_of(part, length, norm);
    for_channels(length, K, [&, mean = mean, rstd = rstd](int64_t i, int64_t c, int64_t count) {
      Vec y = (load(part + i) - mean) * rstd;
      if (weight != nullptr) y = y * load(weight + at + i);
      if (bias != nullptr) y = y + load(bias + at + i);
      store(out, at + i, rotated(y, rotation, c), count);
    });
  }
}

}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif  // LUMINA_LEVEL
