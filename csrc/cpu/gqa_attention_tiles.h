// Tiles of CPU attention. Included once per level, inside that level's target, hence without
// include guard.
//
// Vectors run over rows of q (row = token * R + head of the group), and keys or channels are
// broadcast. Softmax is then vertical, K is read without transposing it, and head_dim is not padded
// to a vector. Operands are arrays of 32-bit units: a float or, where the processor has dot
// products, two bfloat16 that are summed.
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

constexpr int64_t kRows = 64;  // rows of a block of scores
constexpr int64_t kKeys = 96;  // keys of a tile: scores and products stay in the L1 and L2 caches
constexpr int64_t kStep = 6;   // values that a product broadcasts at once ...
constexpr int64_t kVecs = LUMINA_WIDTH == 16 ? 4 : 2;  // ... times vectors: 24 of 32 registers

struct FloatUnit {
  static constexpr int64_t kPer = 1;
  static LUMINA_INLINE Vec mac(Vec acc, Vec a, Vec b) { return acc + a * b; }
};

#ifdef LUMINA_BF16_DOT
struct BFloat16Unit {
  static constexpr int64_t kPer = 2;
  static LUMINA_INLINE Vec mac(Vec acc, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Without arithmetic: the bits of a unit may be those of a NaN.
LUMINA_INLINE Vec repeat(const float* unit) {
#if LUMINA_WIDTH == 16
  return (Vec)_mm512_set1_ps(*unit);
#elif LUMINA_WIDTH == 8
  return (Vec)_mm256_set1_ps(*unit);
#else
  return Vec{*unit, *unit, *unit, *unit};
#endif
}

LUMINA_INLINE int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// acc[i][j] += sum over units u of a[u][rows j] * b[i * b_step + u * b_unit]
template <class Unit>
LUMINA_INLINE void multiply(Vec (&acc)[kStep][kVecs], const float* a, const float* b,
                            int64_t b_step, int64_t b_unit, int64_t units) {
  for (int64_t u = 0; u < units; ++u, a += kRows, b += b_unit) {
    Vec rows[kVecs];
    for (int64_t j = 0; j < kVecs; ++j) rows[j] = load(a + j * kWidth);
    for (int64_t i = 0; i < kStep; ++i) {
      const Vec x = repeat(b + i * b_step);
      for (int64_t j = 0; j < kVecs; ++j) acc[i][j] = Unit::mac(acc[i][j], rows[j], x);
    }
  }
}

// out[n][row] = sum over units of a[u][row] * b[n][u], for `count` n, a multiple of kStep
template <class Unit>
void scores(float* out, const float* a, const float* b, int64_t units, int64_t count) {
  for (int64_t n = 0; n < count; n += kStep) {
    for (int64_t row = 0; row < kRows; row += kVecs * kWidth) {
      Vec acc[kStep][kVecs] = {};
      multiply<Unit>(acc, a + row, b + n * units, units, 1, units);
      for (int64_t i = 0; i < kStep; ++i)
        for (int64_t j = 0; j < kVecs; ++j)
          store(out + (n + i) * kRows + row + j * kWidth, acc[i][j]);
    }
  }
}

// out[c][row] = out[c][row] * factor[row] + sum over units of a[u][row] * b[u][c]
template <class Unit>
void add_product(float* out, const float* factor, const float* a, const float* b, int64_t units,
                 int64_t channels) {
  for (int64_t c = 0; c < channels; c += kStep) {
    for (int64_t row = 0; row < kRows; row += kVecs * kWidth) {
      Vec acc[kStep][kVecs];
      for (int64_t i = 0; i < kStep; ++i)
        for (int64_t j = 0; j < kVecs; ++j)
          acc[i][j] =
              load(out + (c + i) * kRows + row + j * kWidth) * load(factor + row + j * kWidth);
      multiply<Unit>(acc, a + row, b + c, 1, channels, units);
      for (int64_t i = 0; i < kStep; ++i)
        for (int64_t j = 0; j < kVecs; ++j)
          store(out + (c + i) * kRows + row + j * kWidth, acc[i][j]);
    }
  }
}

// Stores two rows of numbers as units of two, or one after the other.
template <class Unit>
LUMINA_INLINE void store_units(float* out, Vec first, Vec second) {
#ifdef LUMINA_BF16_DOT
  if (Unit::kPer == 2) {
    alignas(64) static const int16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return store(out, (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
  }
#endif
  store(out, first);
  store(out + kRows, second);
}

// s[key][row] becomes its weight, in units of keys, and 0 for keys in [keys, padded). Updates top,
// the largest score so far, and total; factor is what earlier sums have to be multiplied by.
template <class Unit>
void softmax(float* s, int64_t keys, int64_t padded, SplitScale split, float* tops, float* total,
             float* factor) {
  const Vec infinite = broadcast(-INFINITY);
  for (int64_t row = 0; row < kRows; row += kWidth) {
    const Vec before = load(tops + row);
    Vec most = load(s + row);  // the scale's sign is the sign of `inner`
    for (int64_t n = 1; n < keys; ++n) {
      const Vec score = load(s + n * kRows + row);
      most = split.inner < 0.f ? min(most, score) : max(most, score);
    }
    Vec top = max(before, most * split.inner);
    store(tops + row, top);
    top = top == infinite ? Vec{} : top;  // no valid key so far
    const Vec old = exp2_of_negative((before - top) * split.outer);
    store(factor + row, old);
    Vec sum = load(total + row) * old;
    for (int64_t n = 0; n < padded; n += 2) {
      Vec p[2] = {};
      for (int64_t i = 0; i < 2; ++i)
        if (n + i < keys) {
          const Vec below = load(s + (n + i) * kRows + row) * split.inner - top;
          p[i] = exp2_of_negative(below * split.outer);
        }
      sum += p[0] + p[1];
      store_units<Unit>(s + n / Unit::kPer * kRows + row, p[0], p[1]);
    }
    store(total + row, sum);
  }
}

// What the gradient of a branch's scores needs of each row: P = 2^((inner * s - top) * outer -
// total).
struct RowTerms {
  float *top, *total, *e, *weight;
};

// With vectors over rows, s becomes weight * P * (dp - e), in units of keys. Or, if `found` is
// given, P * dp is summed into it and s stays. raw, if given, receives P * (dp - e) key by key.
template <class Unit>
void row_gradients(float* s, const float* dp, int64_t keys, int64_t padded, SplitScale split,
                   RowTerms terms, float* found, float* raw) {
  for (int64_t row = 0; row < kRows; row += kWidth) {
    const Vec top = load(terms.top + row), total = load(terms.total + row);
    const Vec e = load(terms.e + row), weight = load(terms.weight + row);
    Vec sum{};
    for (int64_t n = 0; n < padded; n += 2) {
      Vec ds[2] = {};
      for (int64_t i = 0; i < 2 && n + i < keys; ++i) {
        const int64_t at = (n + i) * kRows + row;
        const Vec below = load(s + at) * split.inner - top;
        const Vec p = exp2_of_negative(below * split.outer - total);
        sum += p * load(dp + at);
        ds[i] = p * (load(dp + at) - e);
        if (raw) store(raw + at, ds[i]);
      }
      if (!found)
        store_units<Unit>(s + n / Unit::kPer * kRows + row, ds[0] * weight, ds[1] * weight);
    }
    if (found) store(found + row, load(found + row) + sum);
  }
}

// The same with vectors over keys: s and dp become w * P and w * P * (dp * before - e), in units of
// rows, where e has `before` in it.
template <class Unit>
void key_gradients(float* s, float* dp, int64_t rows, int64_t padded, SplitScale split,
                   float before, RowTerms terms) {
  for (int64_t key = 0; key < kRows; key += kWidth) {
    for (int64_t n = 0; n < padded; n += 2) {
      Vec p[2] = {}, ds[2] = {};
      for (int64_t i = 0; i < 2 && n + i < rows; ++i) {
        const int64_t at = (n + i) * kRows + key;
        const Vec below = load(s + at) * split.inner - terms.top[n + i];
        p[i] = terms.weight[n + i] * exp2_of_negative(below * split.outer - terms.total[n + i]);
        ds[i] = p[i] * (load(dp + at) * before - terms.e[n + i]);
      }
      store_units<Unit>(s + n / Unit::kPer * kRows + key, p[0], p[1]);
      store_units<Unit>(dp + n / Unit::kPer * kRows + key, ds[0], ds[1]);
    }
  }
}

typedef int8_t ByteVec __attribute__((vector_size(LUMINA_WIDTH)));

// The largest relative error of rounding to 16 bits.
LUMINA_INLINE float half_step(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? 0x1p-8f : 0x1p-11f;
}

// The rounding errors of K values, in 127ths of that.
LUMINA_INLINE void rounding_error(int8_t* error, Row rounded, const float* exact, int64_t K) {
  for_vectors(K, [&](int64_t i, int64_t count) {
    const Vec value = load(rounded, i, count), most = abs(value) * half_step(rounded.dtype);
    Vec part = most > 0.f ? (load(exact + i, count) - value) / most : Vec{};
    part =
        min(max(part, broadcast(-1.f)), broadcast(1.f)) * 127.f + 12582912.f;  // to whole numbers
    const ByteVec bytes = __builtin_convertvector((IntVec)part - 0x4b400000, ByteVec);
    store_bits(reinterpret_cast<char*>(error + i), bytes, count);
  });
}

// a . b over K values, with b as it was before rounding; error may be null.
LUMINA_INLINE float exact_product(Row a, Row b, const int8_t* error, int64_t K) {
  Vec total{};
  for_vectors(K, [&](int64_t i, int64_t count) {
    Vec value = load(b, i, count);
    if (error) {
      const auto bytes = load_bits<ByteVec>(reinterpret_cast<const char*>(error + i), count);
      value += __builtin_convertvector(bytes, Vec) * abs(value) * (half_step(b.dtype) / 127.f);
    }
    total += load(a, i, count) * value;
  });
  return sum(total);
}

// ---- packing ----

template <class Unit>
LUMINA_INLINE int64_t units_of(int64_t K) {
  return ceil_div(K, Unit::kPer);
}

// One row of K values as units.
template <class Unit>
LUMINA_INLINE void pack_row(float* out, Row row, int64_t K) {
  if (Unit::kPer == 2) {
    const int64_t pairs = K / 2;
    for_vectors(pairs, [&](int64_t i, int64_t count) {
      store(out + i, load_bits<Vec>(row.data + 4 * i, count), count);
    });
    if (K % 2 == 1) {
      out[pairs] = 0.f;
      std::memcpy(out + pairs, row.data + 4 * pairs, 2);
    }
  } else {
    for_vectors(K, [&](int64_t i, int64_t count) { store(out + i, load(row, i, count), count); });
  }
}

// out[u][i] from rows(i), 0 for rows in [count, kRows)
template <class Unit, class F>
void pack_transposed(float* out, int64_t count, int64_t K, const F& rows) {
  const int64_t units = units_of<Unit>(K);
  alignas(64) float line[264];
  if (count < kRows) std::memset(out, 0, sizeof(float) * units * kRows);
  for (int64_t i = 0; i < count; ++i) {
    pack_row<Unit>(line, rows(i), K);
    for (int64_t u = 0; u < units; ++u) out[u * kRows + i] = line[u];
  }
}

// out[n][u] from rows(n), 0 for n in [count, padded)
template <class Unit, class F>
void pack_rows(float* out, int64_t count, int64_t padded, int64_t K, const F& rows) {
  const int64_t units = units_of<Unit>(K);
  for (int64_t n = 0; n < count; ++n) pack_row<Unit>(out + n * units, rows(n), K);
  std::memset(out + count * units, 0, sizeof(float) * (padded - count) * units);
}

// out[u][c] of units of `padded` rows n, a multiple of 2; 0 for n >= count and c >= K
template <class Unit, class F>
void pack_pairs(float* out, int64_t count, int64_t padded, int64_t K, const F& rows) {
  const int64_t channels = round_up(K, kStep);
  std::memset(out, 0, sizeof(float) * padded / Unit::kPer * channels);
  for (int64_t n = 0; n < count; n += Unit::kPer) {
    float* line = out + n / Unit::kPer * channels;
    if (Unit::kPer == 1) {
      pack_row<FloatUnit>(line, rows(n), K);
      continue;
    }
    const char* first = rows(n).data;
    const char* second = n + 1 < count ? rows(n + 1).data : nullptr;
    for_vectors(K, [&](int64_t c, int64_t some) {
      IntVec bits = __builtin_convertvector(load_bits<HalfVec>(first + 2 * c, some), IntVec);
      if (second)
        bits |= __builtin_convertvector(load_bits<HalfVec>(second + 2 * c, some), IntVec) << 16;
      store(line + c, (Vec)bits, some);
    });
  }
}

// Writes out[c][i] times a factor to rows(i), for every i.
template <class F>
void store_transposed(const float* out, int64_t count, int64_t K, float factor, const F& rows) {
  alignas(64) float line[kMaxHeadDim + kWidth];
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < K; ++c) line[c] = out[c * kRows + i] * factor;
    const Row row = rows(i);
    for_vectors(K, [&](int64_t c, int64_t some) { store(row, c, load(line + c, some), some); });
  }
}

// The next function for a bias that all queries share. Vectors run over keys if their step is 1,
// else over rows.
inline void add_key_bias(const Attention& a, float* s, int64_t key_step, int64_t b, int64_t rows,
                         const int32_t* keys, int64_t count) {
  const float* bias = a.image.bias.data() + b * a.image.count;
  alignas(64) float line[kKeys] = {};
  for (int64_t n = 0; n < count; ++n) line[n] = bias[keys[n]];
  const bool over_keys = key_step == 1;
  const int64_t lines = over_keys ? rows : count, length = over_keys ? count : rows;
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t j = 0; j < length; j += kWidth) {
      float* at = s + i * kRows + j;
      store(at, load(at) * a.image.scale + (over_keys ? load(line + j) : broadcast(line[i])));
    }
}

// Scores s[key * key_step + row * row_step] become scale * s + bias. Times log2(e) a bias of the
// largest finite number, which stands for a mask, would be infinite.
inline void add_bias(const Attention& a, float* s, int64_t key_step, int64_t row_step, int64_t b,
                     int64_t g, int64_t first, int64_t rows, const int32_t* keys, int64_t count) {
  if (!a.image.bias.empty()) return add_key_bias(a, s, key_step, b, rows, keys, count);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t l = (first + r) / a.R, h = g * a.R + (first + r) % a.R;
    const Row line = a.bias.base + (b * a.bias.b + h * a.bias.h + l * a.bias.l);
    for (int64_t n = 0; n < count; ++n) {
      float& score = s[n * key_step + r * row_step];
      score = score * a.image.scale + value_of(line + keys[n] * a.bias.n);
    }
  }
}

// Gradients of that bias.
inline void store_dbias(const Gradients& a, const float* ds, int64_t b, int64_t g, int64_t first,
                        int64_t rows, const int32_t* keys, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t l = (first + r) / a.R, h = g * a.R + (first + r) % a.R;
    float* line = a.dbias + ((b * a.H + h) * a.L + l) * a.image.count;
    for (int64_t n = 0; n < count; ++n) line[keys[n]] = ds[n * kRows + r];
  }
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL

#include "cpu/gqa_attention_own_masks.h"
