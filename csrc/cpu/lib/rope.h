// Shared by the kernels that rotate heads: the heads of a token, angles, cosines and sines. An op's
// file includes this before levels.h, so that every level gets the second part too.
#ifndef LUMINA_ROPE
#define LUMINA_ROPE
#include "cpu/lib/rows.h"

namespace lumina_kernels::cpu {

constexpr int64_t kWidest = 16;  // floats in the widest vector of any level

// All heads of a token: `count` pieces of `length` values, `step` apart; a single piece if there
// are no gaps.
struct TokenHeads {
  Row row;
  int64_t count, length, step;

  int64_t size() const { return count * length; }
};

inline TokenHeads heads_at(const Rows& x, int64_t b, int64_t l, int64_t H, int64_t K) {
  if (H <= 1 || x.h == K) return {x(b, l), 1, H * K, 0};
  return {x(b, l), H, K, x.h};
}

constexpr int64_t kLine = 64;  // bytes that memory is read and written in

inline void prefetch(const TokenHeads& x) {
  const int64_t bytes = x.length * size_of(x.row.dtype), step = x.step * size_of(x.row.dtype);
  for (int64_t n = 0; n < x.count; ++n)
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(x.row.data + n * step + i);
}

// Prefetches the heads of the next token and the lines they will be written to: memory would
// otherwise be idle while this token's angles and sums are computed.
inline void prefetch(const TokenHeads& x, Row out) {
  prefetch(x);
  const int64_t bytes = x.size() * size_of(x.row.dtype);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(out.data + i, 1);
}

// The size of a buffer for n values in which a whole vector may begin at any of them.
inline int64_t padded(int64_t n) { return (n + 2 * kWidest - 1) / kWidest * kWidest; }

// This thread's float32 buffer, aligned to cache lines; the next call returns the same one.
inline float* scratch(int64_t count) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < count + kWidest) memory.resize(count + kWidest);
  const auto misplaced = reinterpret_cast<uintptr_t>(memory.data()) % 64;
  return memory.data() + (64 - misplaced) % 64 / sizeof(float);
}

// A token's cosines and sines for the K channels of a head, arranged for x * cos + swapped(x) *
// sin. The first values are repeated at the end, because a vector may begin at any channel.
struct Rotation {
  float *cos, *sin;
};

inline int64_t rotation_size(int64_t K) { return 2 * padded(K + kWidest); }
inline Rotation rotation_in(float* memory, int64_t K) {
  return {memory, memory + rotation_size(K) / 2};
}

// A tensor of any dtype that is read number by number.
struct Numbers {
  Tensor owner;  // the tensor itself, or a float32 copy if its dtype is a rare one
  ScalarType dtype;
  const void* data;

  explicit Numbers(const Tensor& tensor) : owner(tensor), dtype(tensor.scalar_type()) {
    if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::Long &&
        dtype != ScalarType::Int) {
      dtype = ScalarType::Float;
      owner = torch::stable::to(tensor, dtype);
    }
    data = owner.data_ptr();
  }

  float operator[](int64_t i) const {
    switch (dtype) {
      case ScalarType::Long:
        return static_cast<float>(static_cast<const int64_t*>(data)[i]);
      case ScalarType::Int:
        return static_cast<float>(static_cast<const int32_t*>(data)[i]);
      case ScalarType::Double:
        return static_cast<float>(static_cast<const double*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
};

// The angles sign * position[axis[j]] * inv_freq[j] of every token's pairs.
struct Angles {
  Numbers positions;
  int64_t b = 0, l, c;       // steps of positions
  int64_t pairs, freq_b;     // freq_b: from a sample's frequencies to the next one's, 0 if shared
  std::vector<float> freq;   // of each sample, padded with zeros to whole vectors
  std::vector<float> reach;  // the largest |freq| of each sample, or NaN
  std::vector<int32_t> axis;
  float sign;

  Angles(const Tensor& positions_, const Tensor& inv_freq, const Tensor& axis_, float sign_ = 1)
      : positions(positions_), sign(sign_) {
    const Tensor& owner = positions.owner;
    if (owner.dim() == 3) b = owner.stride(0);
    l = owner.stride(owner.dim() - 2), c = owner.stride(owner.dim() - 1);
    pairs = axis_.size(0);
    read_axis(axis_);
    read_freq(inv_freq);
  }

  // Whether token l has the same angles in every sample.
  bool shared() const { return positions.owner.dim() == 2 && freq_b == 0; }

 private:
  void read_axis(const Tensor& tensor) {
    axis.assign(padded(pairs), 0);
    const bool wide = tensor.scalar_type() == ScalarType::Long;
    for (int64_t j = 0; j < pairs; ++j) {
      const int64_t i = j * tensor.stride(0);
      const int64_t column = wide ? static_cast<const int64_t*>(tensor.data_ptr())[i]
                                  : static_cast<const int32_t*>(tensor.data_ptr())[i];
      axis[j] = column < 0 || column > 2 ? -1 : static_cast<int32_t>(column);
    }
  }

  void read_freq(const Tensor& tensor) {
    const Numbers numbers(tensor);
    const int64_t dim = tensor.dim(), samples = dim == 2 ? tensor.size(0) : 1;
    const int64_t step = numbers.owner.stride(dim - 1);
    freq_b = dim == 2 ? padded(pairs) : 0;
    freq.assign(samples * padded(pairs), 0.f);
    reach.assign(samples, 0.f);
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t j = 0; j < pairs; ++j) {
        const float value = numbers[(dim == 2 ? n * numbers.owner.stride(0) : 0) + j * step];
        freq[n * padded(pairs) + j] = value;
        if (!(std::fabs(value) <= reach[n]) && reach[n] == reach[n]) reach[n] = std::fabs(value);
      }
    }
  }
};

// Calls f(b, l, count) for token l of `count` samples from b on: of all samples at once if they
// share the angles.
template <class F>
void for_tokens(bool shared, int64_t B, int64_t L, int64_t work, const F& f) {
  const int64_t count = shared ? B : 1;
  parallel_rows(B / count * L, count * work,
                [&](int64_t token) { f(token / L, token % L, count); });
}

// Tokens [l, end) of `samples` samples from b on, which share their angles.
struct Tokens {
  int64_t b, samples, l, end;
};

constexpr int64_t kChunk = 8;

// Calls f(tokens) for chunks of tokens: of all samples at once if these share the angles. Their
// rotations are made first, and every tensor's tokens are then read and written one after the
// other: several tensors in turn, token by token, would take a quarter more time.
template <class F>
void for_token_chunks(bool shared, int64_t B, int64_t L, int64_t work, const F& f) {
  const int64_t samples = shared ? B : 1, chunks = ceil_div(L, kChunk);
  parallel_rows(B / samples * chunks, samples * std::min(kChunk, L) * work, [&](int64_t i) {
    const int64_t l = i % chunks * kChunk;
    f(Tokens{i / chunks, samples, l, std::min(l + kChunk, L)});
  });
}

// Float32 arithmetic does not reduce larger angles exactly.
constexpr float kFar = 1.5e6f;

// Sines and cosines of angles of any size; NaN for infinities and NaN.
inline void far_sincos(const float* angles, float* sin, float* cos, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    sin[i] = static_cast<float>(std::sin(static_cast<double>(angles[i])));
    cos[i] = static_cast<float>(std::cos(static_cast<double>(angles[i])));
  }
}

}  // namespace lumina_kernels::cpu
#endif  // LUMINA_ROPE

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {

typedef uint32_t PairVec __attribute__((vector_size(2 * LUMINA_WIDTH)));
typedef uint64_t LongVec __attribute__((vector_size(4 * LUMINA_WIDTH)));

// Swaps the two values of every pair.
LUMINA_INLINE Vec swapped(Vec x) {
#if LUMINA_WIDTH == 16
  return (Vec)_mm512_permute_ps((__m512)x, 0xb1);
#elif LUMINA_WIDTH == 8
  return (Vec)_mm256_permute_ps((__m256)x, 0xb1);
#else
  const LongVec pairs = (LongVec)x;
  return (Vec)(pairs << 32 | pairs >> 32);
#endif
}

// Calls f(i, count) for vectors that cover [0, length). The last one begins earlier so that it is
// whole, and overlaps the one before; count is below kWidth only if length is.
template <class F>
LUMINA_INLINE void for_whole_vectors(int64_t length, const F& f) {
  if (length < kWidth) return f(0, length);
  int64_t i = 0;
  for (; i + kWidth <= length; i += kWidth) f(i, kWidth);
  if (i < length) f(length - kWidth, kWidth);
}

// The same over heads of K values: f(i, c, count) gets the channel c = i mod K too.
template <class F>
LUMINA_INLINE void for_channels(int64_t length, int64_t K, const F& f) {
  if (length < kWidth) return f(0, 0, length);
  const int64_t step = kWidth % K;
  int64_t i = 0, c = 0;
  for (; i + kWidth <= length; i += kWidth) {
    f(i, c, kWidth);
    c += step;
    if (c >= K) c -= K;
  }
  if (i < length) f(length - kWidth, (length - kWidth) % K, kWidth);
}

// Copies all heads of a token to float32, without gaps.
LUMINA_INLINE void stage(const TokenHeads& x, float* to) {
  for (int64_t n = 0; n < x.count; ++n) {
    const Row from = x.row + n * x.step;
    float* piece = to + n * x.length;
    for_whole_vectors(
        x.length, [&](int64_t i, int64_t count) { store(piece + i, load(from, i, count), count); });
  }
}

LUMINA_INLINE void fill_zeros(Row row, int64_t length) {
  for_whole_vectors(length, [&](int64_t i, int64_t count) { store(row, i, Vec{}, count); });
}

// sin(x) and cos(x) within 1.1 ulp of 1 for |x| <= kFar; NaN for NaN.
//
// x = n * pi/2 + r with pi/2 = c1 + c2 + c3. c1 and c2 have 14 bits and n is split into a multiple
// of 1024 and the rest, so that all products with them are exact, whether fused or not.
LUMINA_INLINE void sincos(Vec x, Vec& sin, Vec& cos) {
  const Vec shifted = x * 0.6366197723675814f + 12582912.f;
  const Vec n = shifted - 12582912.f;
  const Vec coarse = (n + 12884901888.f) - 12884901888.f, fine = n - coarse;
  Vec r = x - coarse * 1.5706787109375f;
  r = r - fine * 1.5706787109375f;
  r = r - coarse * 0.00011761486530303955f;
  r = r - fine * 0.00011761486530303955f;
  r = r - n * 9.92093629470503e-10f;
  const Vec u = r * r;
  Vec odd = (-0.00019514957966748625f * u + 0.00833215843886137f) * u - 0.16666655242443085f;
  odd = r + r * u * odd;
  Vec even = (2.4432785721728578e-05f * u - 0.0013887312961742282f) * u + 0.04166664555668831f;
  even = 1.f + u * (u * even - 0.5f);
  const IntVec quadrant = as_int(shifted), even_quadrant = (quadrant & 1) == 0;
  sin = as_float(as_int(even_quadrant ? odd : even) ^ ((quadrant & 2) << 30));
  cos = as_float(as_int(even_quadrant ? even : odd) ^ (((quadrant + 1) & 2) << 30));
}

// Stores kWidth values of pairs, each one twice, with the sign bits of `flip` inverted.
LUMINA_INLINE void store_twice(float* to, Vec values, uint64_t flip) {
  PairVec halves[2];
  std::memcpy(halves, &values, sizeof(values));
  for (int n = 0; n < 2; ++n) {
#if LUMINA_WIDTH == 16
    const LongVec wide = (LongVec)_mm512_cvtepu32_epi64((__m256i)halves[n]);
#else
    const LongVec wide = __builtin_convertvector(halves[n], LongVec);
#endif
    store(to + n * kWidth, (Vec)((wide | wide << 32) ^ flip));
  }
}

// table[i] = table[i - K] for the kWidth values from K on.
LUMINA_INLINE void repeat(float* table, int64_t K) {
  if (K >= kWidth) return store(table + K, load(table));
  for (int64_t i = 0; i < kWidth; ++i) table[K + i] = table[i];
}

// Cosines and sines of one token, for all of its heads.
LUMINA_INLINE void make_rotation(const Angles& angles, int64_t b, int64_t l, Rotation rotation) {
  const int64_t at = b * angles.b + l * angles.l, sample = angles.freq_b == 0 ? 0 : b;
  const Numbers& positions = angles.positions;
  const float p[] = {positions[at], positions[at + angles.c], positions[at + 2 * angles.c]};
  const float reach = angles.reach[sample];
  const bool near = std::fabs(p[0]) * reach <= kFar && std::fabs(p[1]) * reach <= kFar &&
                    std::fabs(p[2]) * reach <= kFar;
  // The even channel of a pair adds -b sin and the odd one a sin; backwards the signs are swapped.
  const uint64_t flip = angles.sign > 0 ? uint64_t{1} << 31 : uint64_t{1} << 63;
  for (int64_t j = 0; j < angles.pairs; j += kWidth) {
    IntVec axis;
    std::memcpy(&axis, angles.axis.data() + j, sizeof(axis));
    Vec position = axis == 2 ? broadcast(p[2]) : broadcast(NAN);
    position = axis == 1 ? broadcast(p[1]) : position;
    position = axis == 0 ? broadcast(p[0]) : position;
    const Vec angle = position * load(angles.freq.data() + sample * angles.freq_b + j);
    Vec sin, cos;
    if (near) {
      sincos(angle, sin, cos);
    } else {
      float values[3][kWidth];
      store(values[0], angle);
      far_sincos(values[0], values[1], values[2], kWidth);
      sin = load(values[1]), cos = load(values[2]);
    }
    store_twice(rotation.cos + 2 * j, cos, 0);
    store_twice(rotation.sin + 2 * j, sin, flip);
  }
  repeat(rotation.cos, 2 * angles.pairs);
  repeat(rotation.sin, 2 * angles.pairs);
}

// The rotations of kChunk tokens, each in rotation_size(K) values from `memory` on.
LUMINA_INLINE void make_rotations(const Angles& angles, const Tokens& tokens, float* memory,
                                  int64_t K) {
  for (int64_t l = tokens.l; l < tokens.end; ++l, memory += rotation_size(K))
    make_rotation(angles, tokens.b, l, rotation_in(memory, K));
}

// (a, b) -> (a cos - b sin, a sin + b cos) for the pairs of a vector that begins at channel c.
LUMINA_INLINE Vec rotated(Vec x, Rotation rotation, int64_t c) {
  return x * load(rotation.cos + c) + swapped(x) * load(rotation.sin + c);
}

// Rotates all heads of a token and writes them without gaps.
LUMINA_INLINE void rotate_heads(const TokenHeads& x, Rotation rotation, int64_t K, Row out) {
  for (int64_t n = 0; n < x.count; ++n) {
    const Row from = x.row + n * x.step, to = out + n * x.length;
    for_channels(x.length, K, [&](int64_t i, int64_t c, int64_t count) {
      store(to, i, rotated(load(from, i, count), rotation, c), count);
    });
  }
}

}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif  // LUMINA_LEVEL
