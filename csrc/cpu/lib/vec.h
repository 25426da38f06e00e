// LUMINA_WIDTH floats as one value, by the compiler's vector extension, which provides + - * / and
// comparisons. Included once per level, inside that level's target, hence without include guard.
namespace lumina_kernels::cpu::LUMINA_LEVEL {

constexpr int64_t kWidth = LUMINA_WIDTH;
typedef float Vec __attribute__((vector_size(4 * LUMINA_WIDTH)));
typedef int32_t IntVec __attribute__((vector_size(4 * LUMINA_WIDTH)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LUMINA_WIDTH)));

LUMINA_INLINE Vec broadcast(float value) { return value - Vec{}; }

LUMINA_INLINE Vec as_float(IntVec bits) { return (Vec)bits; }
LUMINA_INLINE IntVec as_int(Vec value) { return (IntVec)value; }

// b if one of them is NaN. The instruction by name: GCC 12 turns the general form into a comparison
// and a selection.
LUMINA_INLINE Vec max(Vec a, Vec b) {
#if LUMINA_WIDTH == 16
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LUMINA_WIDTH == 8
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

LUMINA_INLINE Vec min(Vec a, Vec b) {
#if LUMINA_WIDTH == 16
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif LUMINA_WIDTH == 8
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

LUMINA_INLINE Vec abs(Vec a) { return as_float(as_int(a) & 0x7fffffff); }

// ---- 16 bits to float32 and back, to nearest even ----

// The instruction by name: GCC 12 turns __builtin_convertvector, which should be one, into five.
LUMINA_INLINE IntVec widen(HalfVec bits) {
#if LUMINA_WIDTH == 16
  return (IntVec)_mm512_cvtepu16_epi32((__m256i)bits);
#elif LUMINA_WIDTH == 8
  return (IntVec)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, IntVec);
#endif
}

// The lower 16 bits.
LUMINA_INLINE HalfVec narrow(IntVec bits) {
#if LUMINA_WIDTH == 16
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, HalfVec);
#endif
}

LUMINA_INLINE Vec from_bfloat16(HalfVec bits) { return as_float(widen(bits) << 16); }

// Its upper 16 bits are those of the bfloat16.
LUMINA_INLINE IntVec bfloat16_bits(Vec value) {
  const IntVec bits = as_int(value);
  return value == value ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

LUMINA_INLINE HalfVec to_bfloat16(Vec value) {
#ifdef LUMINA_BF16_DOT
  return (HalfVec)_mm512_cvtneps_pbh((__m512)value);
#else
  return narrow(bfloat16_bits(value) >> 16);
#endif
}

LUMINA_INLINE Vec from_half(HalfVec bits) {
#if LUMINA_WIDTH == 16
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#elif LUMINA_WIDTH == 8
  return (Vec)_mm256_cvtph_ps((__m128i)bits);
#else
  // Exponents grow by 112; subnormals are exact multiples of 2^-24; infinities and NaN keep their
  // exponent.
  const IntVec wide = widen(bits);
  const IntVec sign = (wide & 0x8000) << 16, magnitude = wide & 0x7fff;
  const Vec subnormal = __builtin_convertvector(magnitude, Vec) * 5.9604644775390625e-8f;
  const IntVec normal = (magnitude << 13) + (112 << 23);
  const IntVec special = (magnitude << 13) | 0x7f800000;
  const IntVec finite = magnitude < 0x400 ? as_int(subnormal) : normal;
  return as_float(sign | (magnitude < 0x7c00 ? finite : special));
#endif
}

LUMINA_INLINE HalfVec to_half(Vec value) {
#if LUMINA_WIDTH == 16
  return (HalfVec)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif LUMINA_WIDTH == 8
  return (HalfVec)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  const IntVec bits = as_int(value), magnitude = bits & 0x7fffffff;
  const IntVec normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14, adding 1/2 leaves multiples of 2^-24 in the last bits, rounded by the addition.
  const IntVec subnormal = as_int(as_float(magnitude) + 0.5f) - 0x3f000000;
  const IntVec finite = magnitude < (113 << 23) ? subnormal : normal;
  const IntVec infinite = magnitude < 0x477ff000 ? finite : IntVec{} + 0x7c00;
  const IntVec whole = magnitude > 0x7f800000 ? IntVec{} + 0x7e00 : infinite;
  return narrow(whole | ((bits >> 16) & 0x8000));
#endif
}

// ---- memory: `count` values from i on, 0 beyond them ----

#if LUMINA_WIDTH == 16
LUMINA_INLINE __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1 << count) - 1); }
#endif

template <class T>
LUMINA_INLINE T load_bits(const char* data, int64_t count) {
  T bits{};
  if (count >= kWidth) {
    std::memcpy(&bits, data, sizeof(T));
  } else if (count > 0) {
#if LUMINA_WIDTH == 16  // memcpy would be a call
    if constexpr (sizeof(T) == 64) return (T)_mm512_maskz_loadu_epi32(lanes(count), data);
    if constexpr (sizeof(T) == 32) return (T)_mm256_maskz_loadu_epi16(lanes(count), data);
    if constexpr (sizeof(T) == 16) return (T)_mm_maskz_loadu_epi8(lanes(count), data);
#endif
    std::memcpy(&bits, data, count * sizeof(bits[0]));
  }
  return bits;
}

template <class T>
LUMINA_INLINE void store_bits(char* data, T bits, int64_t count) {
  if (count >= kWidth) {
    std::memcpy(data, &bits, sizeof(T));
  } else if (count > 0) {
#if LUMINA_WIDTH == 16
    if constexpr (sizeof(T) == 64)
      return _mm512_mask_storeu_epi32(data, lanes(count), (__m512i)bits);
    if constexpr (sizeof(T) == 32)
      return _mm256_mask_storeu_epi16(data, lanes(count), (__m256i)bits);
    if constexpr (sizeof(T) == 16) return _mm_mask_storeu_epi8(data, lanes(count), (__m128i)bits);
#endif
    std::memcpy(data, &bits, count * sizeof(bits[0]));
  }
}

LUMINA_INLINE Vec load(Row row, int64_t i, int64_t count = kWidth) {
  if (row.dtype == Dtype::kFloat) return load_bits<Vec>(row.data + 4 * i, count);
  const HalfVec bits = load_bits<HalfVec>(row.data + 2 * i, count);
  return row.dtype == Dtype::kHalf ? from_half(bits) : from_bfloat16(bits);
}

LUMINA_INLINE void store(Row row, int64_t i, Vec value, int64_t count = kWidth) {
  if (row.dtype == Dtype::kFloat) return store_bits(row.data + 4 * i, value, count);
  store_bits(row.data + 2 * i, row.dtype == Dtype::kHalf ? to_half(value) : to_bfloat16(value),
             count);
}

// Values next to each other, 2 * kWidth of them, in an order that `store` of a pair undoes:
// bfloat16 at even places and those at odd ones, which come apart and together without a shuffle.
struct Pair {
  Vec first, second;
};

LUMINA_INLINE Pair load_pair(Row row, int64_t i) {
  if (row.dtype != Dtype::kBFloat16) return {load(row, i), load(row, i + kWidth)};
  const IntVec bits = load_bits<IntVec>(row.data + 2 * i, kWidth);
  return {as_float(bits << 16), as_float(bits & ~0xffff)};
}

LUMINA_INLINE void store(Row row, int64_t i, Pair pair) {
  if (row.dtype != Dtype::kBFloat16) {
    store(row, i, pair.first);
    return store(row, i + kWidth, pair.second);
  }
  const IntVec even = (bfloat16_bits(pair.first) >> 16) & 0xffff;
  store_bits(row.data + 2 * i, even | (bfloat16_bits(pair.second) & ~0xffff), kWidth);
}

// Calls f(dtype) so that the compiler knows which one it is: loops in f are compiled for each.
template <class F>
LUMINA_INLINE void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat) return f(Dtype::kFloat);
  if (dtype == Dtype::kHalf) return f(Dtype::kHalf);
  f(Dtype::kBFloat16);
}

LUMINA_INLINE Vec load(const float* data, int64_t count = kWidth) {
  return load_bits<Vec>(reinterpret_cast<const char*>(data), count);
}

LUMINA_INLINE void store(float* data, Vec value, int64_t count = kWidth) {
  store_bits(reinterpret_cast<char*>(data), value, count);
}

// Calls f(i, count) for the vectors of [0, length). All but the last are whole, and f is compiled
// separately for them.
template <class F>
LUMINA_INLINE void for_vectors(int64_t length, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= length; i += kWidth) f(i, kWidth);
  if (i < length) f(i, length - i);
}

// ---- functions ----

LUMINA_INLINE float sum(Vec value) {
#if LUMINA_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)value);
#elif LUMINA_WIDTH == 8
  const __m256 all = (__m256)value;
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  for (int half = LUMINA_WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) value[i] += value[i + half];
  return value[0];
#endif
}

// p * 2^n for a whole number n in [-252, 252]; a subnormal result may be 0.
LUMINA_INLINE Vec scale_by_power(Vec p, Vec n) {
#if LUMINA_WIDTH == 16
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two factors, both normal numbers, so that neither exponent overflows.
  const IntVec whole = (IntVec)(n + 12582912.f) - 0x4b400000, half = whole >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
#endif
}

// To the nearest whole number: next to 1.5 * 2^23 there are no bits left for a fraction.
LUMINA_INLINE Vec round(Vec x) { return (x + 12582912.f) - 12582912.f; }

// 2^x with a relative error of at most 2e-7; 0 and infinity beyond float32, NaN for NaN.
LUMINA_INLINE Vec exp2(Vec x) {
  x = max(broadcast(-150.f), min(broadcast(129.f), x));  // in this order NaN stays NaN
  const Vec n = round(x), f = x - n;
  Vec p = broadcast(1.32647272e-3f);
  p = p * f + 9.67151281e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.f;
  return scale_by_power(p, n);
}

// 2^x for x <= 0, and 0 for -infinity.
LUMINA_INLINE Vec exp2_of_negative(Vec x) {
#if LUMINA_WIDTH == 16
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
  Vec p = broadcast(1.87757668e-3f);
  p = p * f + 8.98934017e-3f;
  p = p * f + 5.58263179e-2f;
  p = p * f + 2.40153617e-1f;
  p = p * f + 6.93153073e-1f;
  p = p * f + 9.99999925e-1f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);  // by 2^floor(x)
#else
  return exp2(x);
#endif
}

LUMINA_INLINE Vec exp(Vec x) {
  x = max(broadcast(-104.f), min(broadcast(89.f), x));
  const Vec n = round(x * 1.44269504f);
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // x - n log(2), in two parts
  Vec p = broadcast(1.38146020e-3f);
  p = p * r + 8.36871530e-3f;
  p = p * r + 4.16683879e-2f;
  p = p * r + 1.66665206e-1f;
  p = p * r + 4.99999934e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return scale_by_power(p, n);
}

// (1 - e) / (1 + e) with e = exp(-2|x|); near 0, where 1 - e cancels, the Padé approximant [5/4].
LUMINA_INLINE Vec tanh(Vec x) {
  const Vec size = abs(x), square = x * x, e = exp(-2.f * size);
  const Vec above = size < 0.6f ? size * (945.f + square * (105.f + square)) : 1.f - e;
  const Vec below = size < 0.6f ? 945.f + square * (420.f + square * 15.f) : 1.f + e;
  const Vec result = above / below;
  return x < 0.f ? -result : result;
}

}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
