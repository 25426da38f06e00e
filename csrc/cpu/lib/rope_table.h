// Shared by the kernels that rotate heads by tables: cosines and sines, read where they lie.
// Included before levels.h, as rope.h is.
#include "cpu/lib/rope.h"

#ifndef LUMINA_ROPE_TABLE
#define LUMINA_ROPE_TABLE
namespace lumina_kernels::cpu {

// Cosines or sines (L, W), (B or 1, L, W) or (B or 1, L, H or 1, W): `width` entries, `step` apart,
// from sample b, token l and head h on. The steps of what is shared are 0.
struct Table {
  char* data;
  bool is_double;
  Dtype dtype;  // if it is not float64
  int64_t b, l, h, step, width, heads;

  explicit Table(const Tensor& table)
      : data(static_cast<char*>(table.data_ptr())),
        is_double(table.scalar_type() == ScalarType::Double),
        dtype(is_double ? Dtype::kFloat : dtype_of(table)) {
    const int64_t dim = table.dim();
    const auto step_of = [&](int64_t i) { return table.size(i) == 1 ? 0 : table.stride(i); };
    b = dim > 2 ? step_of(0) : 0, l = step_of(dim > 2 ? 1 : 0), h = dim > 3 ? step_of(2) : 0;
    step = table.stride(dim - 1), width = table.size(dim - 1);
    heads = dim > 3 ? table.size(2) : 1;
  }

  char* at(int64_t i, int64_t j, int64_t k) const {
    return data + (i * b + j * l + k * h) * (is_double ? 8 : size_of(dtype));
  }
};

// The rotation of the first C channels of every head; backward, that of the gradient.
struct RotaryTables {
  Table cos, sin;
  bool half, backward;
  int64_t T, C;  // T heads of the tables: all or 1

  RotaryTables(const Tensor& cos_, const Tensor& sin_, const std::string& pairing, int64_t channels,
               bool backward_)
      : cos(cos_),
        sin(sin_),
        half(pairing == "half"),
        backward(backward_),
        T(std::max(cos.heads, sin.heads)),
        C(channels) {}

  // Whether token l has the same rotation in every sample.
  bool shared() const { return cos.b == 0 && sin.b == 0; }
};

// The size of a buffer for the rotation of C channels by tables.
inline int64_t tables_size(int64_t C) { return rotation_size(C) + padded(C); }

}  // namespace lumina_kernels::cpu
#endif  // LUMINA_ROPE_TABLE

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {

inline void read_entries(const Table& table, char* from, float* to) {
  if (table.is_double) {
    const auto data = reinterpret_cast<const double*>(from);
    for (int64_t i = 0; i < table.width; ++i) to[i] = static_cast<float>(data[i * table.step]);
  } else if (table.dtype == Dtype::kFloat) {
    const auto data = reinterpret_cast<const float*>(from);
    for (int64_t i = 0; i < table.width; ++i) to[i] = data[i * table.step];
  } else {
    const Row row{from, table.dtype};
    for (int64_t i = 0; i < table.width; ++i) to[i] = load(row, i * table.step, 1)[0];
  }
}

// The entries of all C channels without gaps: in memory, or in `buffer` if they do not lie so.
inline Row entries_of(const Table& table, char* from, bool half, int64_t C, float* buffer) {
  if (table.step == 1 && table.width == C && !table.is_double) return {from, table.dtype};
  read_entries(table, from, buffer);
  if (table.width < C) {
    const int64_t M = C / 2;
    if (half) std::copy(buffer, buffer + M, buffer + M);
    for (int64_t j = half ? 0 : M; j-- > 0;) buffer[2 * j] = buffer[2 * j + 1] = buffer[j];
  }
  return {reinterpret_cast<char*>(buffer), Dtype::kFloat};
}

// The even channel of a pair adds -sin_a b and the odd one sin_b a; backwards sin_b b and -sin_a a.
inline void make_interleaved(Row sin, bool backward, int64_t C, float* to) {
  const LongVec flip = LongVec{} + (backward ? uint64_t{1} << 63 : uint64_t{1} << 31);
  for_whole_vectors(C, [&](int64_t i, int64_t count) {
    const Vec values = load(sin, i, count);
    store(to + i, (Vec)((LongVec)(backward ? swapped(values) : values) ^ flip), count);
  });
  repeat(to, C);
}

// The same for pairs of channels j and j + C/2.
inline void make_half(Row sin, bool backward, int64_t C, float* to) {
  const int64_t M = C / 2;
  const Row a = backward ? sin + M : sin, b = backward ? sin : sin + M;
  for_whole_vectors(M, [&](int64_t j, int64_t count) {
    const Vec first = load(a, j, count), second = load(b, j, count);
    store(to + j, backward ? first : -first, count);
    store(to + M + j, backward ? -second : second, count);
  });
}

// Cosines and sines of one token and, if these differ, of its head h.
inline Rotation make_rotation(const RotaryTables& tables, int64_t b, int64_t l, int64_t h,
                              float* memory) {
  const auto [half, C] = std::tuple{tables.half, tables.C};
  float* buffer = memory + rotation_size(C);
  const Rotation rotation = rotation_in(memory, C);
  const Row cos = entries_of(tables.cos, tables.cos.at(b, l, h), half, C, buffer);
  stage({cos, 1, C, 0}, rotation.cos);
  repeat(rotation.cos, C);
  const Row sin = entries_of(tables.sin, tables.sin.at(b, l, h), half, C, buffer);
  half ? make_half(sin, tables.backward, C, rotation.sin)
       : make_interleaved(sin, tables.backward, C, rotation.sin);
  return rotation;
}

// Rotates heads of C channels whose pairs are channels j and j + C/2.
LUMINA_INLINE void rotate_half(const TokenHeads& x, Rotation rotation, int64_t C, Row out) {
  const int64_t M = C / 2;
  const float *cos_a = rotation.cos, *cos_b = cos_a + M, *sin_a = rotation.sin, *sin_b = sin_a + M;
  for (int64_t at = 0; at < x.size(); at += C) {
    const Row from = x.row + at / x.length * x.step + at % x.length, to = out + at;
    for_whole_vectors(M, [&](int64_t j, int64_t count) {
      const Vec a = load(from, j, count), b = load(from + M, j, count);
      store(to, j, a * load(cos_a + j) + b * load(sin_a + j), count);
      store(to + M, j, b * load(cos_b + j) + a * load(sin_b + j), count);
    });
  }
}

inline void rotate_channels(const TokenHeads& x, bool half, Rotation rotation, int64_t C, Row out) {
  half ? rotate_half(x, rotation, C, out) : rotate_heads(x, rotation, C, out);
}

// Rotates heads of K values and writes them without gaps. Channels from C on stay as they are.
inline void rotate_by(const RotaryTables& tables, const TokenHeads& x, Rotation rotation, int64_t K,
                      Row out) {
  const auto [half, C] = std::tuple{tables.half, tables.C};
  if (C == K) return rotate_channels(x, half, rotation, C, out);
  for (int64_t at = 0; at < x.size(); at += K) {
    const Row from = x.row + at / x.length * x.step + at % x.length, to = out + at;
    rotate_channels({from, 1, C, 0}, half, rotation, C, to);
    for_whole_vectors(K - C, [&, C = C](int64_t i, int64_t count) {
      store(to + C, i, load(from + C, i, count), count);
    });
  }
}

// The same for all heads of a token, and tables for each of them or for all.
inline void rotate_token(const RotaryTables& tables, const TokenHeads& x, int64_t b, int64_t l,
                         int64_t K, float* memory, Row out) {
  if (tables.T == 1) return rotate_by(tables, x, make_rotation(tables, b, l, 0, memory), K, out);
  for (int64_t h = 0; h * K < x.size(); ++h) {
    const Row head = x.row + h * K / x.length * x.step + h * K % x.length;
    rotate_by(tables, {head, 1, K, 0}, make_rotation(tables, b, l, h, memory), K, out + h * K);
  }
}

}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif  // LUMINA_LEVEL
