// Norms over rows (B, L, D). Included before levels.h, for what does not depend on the instruction
// set, and again inside every level, for the functions over one row.
#ifndef LUMINA_LEVEL
#include "cpu/lib/chunks.h"

namespace lumina_kernels::cpu {

// Value l of row b of a float32 tensor.
inline float* float_at(const Rows& rows, int64_t b, int64_t l) {
  return reinterpret_cast<float*>(rows(b).data) + l;
}

struct Statistics {
  float mean, rstd;
};

// The float32 tensor of statistics (1 or 2, B, L): rstd and, for a LayerNorm, the mean.
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

}  // namespace lumina_kernels::cpu
#else
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// The first `count` values, and 0 in place of the others.
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

// Sum of the vectors f(i, count). Four running sums, because additions to a single one would wait
// for each other.
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

// For vectors x(i, count) that are 0 beyond count.
template <class F>
LUMINA_INLINE Statistics statistics(int64_t D, float eps, bool layer, const F& x) {
  if (!layer) return {0.f, rms_rstd(D, eps, x)};
  const float mean = row_sum(D, x) / D;
  return {mean, rms_rstd(D, eps, [&](int64_t i, int64_t count) {
            return keep(x(i, count) - mean, count);
          })};
}

// The gradient of a norm's input, rstd * (d - mean(d) - n * mean(d * n)), from n, the norm's
// output, and d, its gradient; an RMS norm has no mean(d). After add(d, n) for all vectors of a
// row.
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

struct NormGradient {
  Vec d, n;
};

// The first of a norm's two backward passes over a row, for the means: gradient(i, count) returns d
// and n of one vector. The second pass uses the result.
template <class Gradient>
LUMINA_INLINE NormBwd norm_bwd_means(int64_t D, bool layer, float rstd, const Gradient& gradient) {
  NormBwd norm;
  for_vectors(D, [&](int64_t i, int64_t count) {
    const NormGradient g = gradient(i, count);
    norm.add(g.d, g.n);
  });
  norm.finish(D, layer, rstd);
  return norm;
}

// ---- sums over rows ----

LUMINA_INLINE Vec total(const Partials& partials, int64_t b, int64_t sum, int64_t i) {
  Vec result{};
  for (int64_t chunk = 0; chunk < partials.chunks; ++chunk)
    result += load(partials(b, chunk, sum) + i);
  return result;
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif
