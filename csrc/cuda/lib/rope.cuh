// Shared by the kernels that rotate heads: a token's heads distributed to threads, cosines and
// sines.
#pragma once

#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

// (B, L, H, K): head h of token l of sample b starts at b * step_b + l * step_l + h * step_h.
struct HeadsView {
  Values values;
  int64_t step_b, step_l, step_h;

  __device__ __forceinline__ int64_t at(int64_t b, int64_t l, int64_t h) const {
    return b * step_b + l * step_l + h * step_h;
  }
};

__device__ __forceinline__ bool is_there(const HeadsView& x) { return x.values.data != nullptr; }

// first ? a : b, member by member: a kernel argument whose address is taken is copied to the stack.
__device__ __forceinline__ Values select(bool first, const Values& a, const Values& b) {
  return {first ? a.data : b.data, first ? a.dtype : b.dtype, first ? a.vectors : b.vectors};
}
__device__ __forceinline__ HeadsView select(bool first, const HeadsView& a, const HeadsView& b) {
  return {select(first, a.values, b.values), first ? a.step_b : b.step_b,
          first ? a.step_l : b.step_l, first ? a.step_h : b.step_h};
}

// --- threads ---

// The threads of a block: `slots` tokens at a time, with `threads` (whole warps) for each. Thread i
// of a token has the 8 channels from 8 * (i % pieces) on of heads i / pieces, i / pieces + step,
// ...; the last threads may be idle.
struct RowLayout {
  int pieces, step, threads, slots;
  unsigned inverse;  // 2^20 / pieces, rounded up: i / pieces is i * inverse >> 20 for i < 1024
};

// `per_thread`: heads per thread; `least`: threads of a block, which several tokens share if one
// does not fill it.
inline RowLayout row_layout(int64_t heads, int64_t pieces, int64_t per_thread, int64_t least) {
  const int64_t step = ceil_div(heads, per_thread), threads = 32 * ceil_div(pieces * step, 32);
  const int64_t slots = threads < least ? least / threads : 1;
  return {static_cast<int>(pieces), static_cast<int>(step), static_cast<int>(threads),
          static_cast<int>(slots), static_cast<unsigned>(ceil_div(1 << 20, pieces))};
}

// As few heads per thread as `threads` threads allow for a token. A head with more pieces takes
// several blocks, along y.
inline RowLayout token_layout(int64_t heads, int64_t pieces, int64_t threads) {
  pieces = pieces < threads ? pieces : threads;
  return row_layout(heads, pieces, ceil_div(heads, threads / pieces), threads / 2);
}

inline LaunchConfig token_config(const RowLayout& layout, int64_t tokens, int64_t pieces,
                                 int64_t shared_floats) {
  return {dim3(static_cast<unsigned>(ceil_div(tokens, layout.slots)),
               static_cast<unsigned>(ceil_div(pieces, layout.pieces))),
          dim3(static_cast<unsigned>(layout.slots * layout.threads)),
          static_cast<size_t>(4 * shared_floats)};
}

inline LaunchConfig row_config(const RowLayout& layout, int64_t blocks, int64_t shared_floats) {
  return {dim3(static_cast<unsigned>(blocks)),
          dim3(static_cast<unsigned>(layout.slots * layout.threads)),
          static_cast<size_t>(4 * shared_floats)};
}

struct RowPlace {
  int slot, thread, piece, head;  // `thread` within the slot; an idle thread has kNoHead
};

constexpr int kNoHead = 1 << 30;

__device__ __forceinline__ RowPlace row_place(const RowLayout& layout) {
  const unsigned slot = layout.slots == 1 ? 0 : threadIdx.x / static_cast<unsigned>(layout.threads);
  const unsigned thread = threadIdx.x - slot * layout.threads;
  const unsigned head = thread * layout.inverse >> 20;
  const unsigned piece = thread - head * layout.pieces;
  return {static_cast<int>(slot), static_cast<int>(thread), static_cast<int>(piece),
          static_cast<int>(head) < layout.step ? static_cast<int>(head) : kNoHead};
}

// Token l of sample b. Launchers check that there are less than 2^31 of all samples.
struct Token {
  uint32_t b, l;
};

// Token `number` of all.
__device__ __forceinline__ Token token_of(int64_t number, int64_t L) {
  const uint32_t n = static_cast<uint32_t>(number), b = n / static_cast<uint32_t>(L);
  return {b, n - b * static_cast<uint32_t>(L)};
}

// --- numbers that are read once per token, of any dtype ---

enum class Number : int32_t {
  kDouble,
  kFloat,
  kHalf,
  kBFloat16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8
};

struct NumbersView {
  Global<const unsigned char> data;
  Number dtype;
};

__device__ __forceinline__ float load_number(const NumbersView& x, int64_t i) {
  switch (x.dtype) {
    case Number::kDouble:
      return static_cast<float>(load_global<double>(x.data + 8 * i));
    case Number::kFloat:
      return load_global<float>(x.data + 4 * i);
    case Number::kHalf:
      return half_to_float(load_global<unsigned short>(x.data + 2 * i));
    case Number::kBFloat16:
      return bfloat16_to_float(load_global<unsigned short>(x.data + 2 * i));
    case Number::kInt64:
      return static_cast<float>(load_global<long long>(x.data + 8 * i));
    case Number::kInt32:
      return static_cast<float>(load_global<int>(x.data + 4 * i));
    case Number::kInt16:
      return static_cast<float>(load_global<short>(x.data + 2 * i));
    case Number::kInt8:
      return static_cast<float>(load_global<signed char>(x.data + i));
    default:
      return static_cast<float>(load_global<unsigned char>(x.data + i));
  }
}

// int32 or int64.
__device__ __forceinline__ int64_t load_integer(const NumbersView& x, int64_t i) {
  if (x.dtype == Number::kInt64) return load_global<long long>(x.data + 8 * i);
  return load_global<int>(x.data + 4 * i);
}

// --- angles ---

// Positions (B, L, 3), frequencies (B, K / 2) and axes (K / 2,) with their steps; a step is 0 along
// an axis that is shared.
struct AnglesView {
  NumbersView positions, inv_freq, axis;
  int64_t position_b, position_l, position_column, freq_b, freq_pair, axis_pair;
};

// The number of a token's cosines and sines.
inline int64_t rotation_floats(int64_t pieces) { return 8 * pieces; }

// The threads of a slot write (cos, sin) of sign * position[axis] * inv_freq for the pairs of its T
// tokens, from pair `first` on. NaN for an axis other than 0, 1 or 2; padding is not rotated.
template <int T>
__device__ __forceinline__ void fill_rotations(const AnglesView& angles, const Token (&tokens)[T],
                                               float sign, int first, int K,
                                               const RowLayout& layout, const RowPlace& at,
                                               Shared<float> rotations) {
  const int pairs = 4 * layout.pieces;  // of a token
  rotations += at.slot * 2 * T * pairs;
  for (int i = at.thread; i < T * pairs; i += layout.threads) {
    Token token = tokens[0];
    int own = i;
#pragma unroll
    for (int t = 1; t < T; ++t) {
      if (i >= t * pairs) token = tokens[t], own = i - t * pairs;
    }
    const int pair = first + own;
    float angle = 0.0f;
    if (2 * pair < K) {
      // Before the position, which has to wait for its axis.
      const float freq =
          load_number(angles.inv_freq, token.b * angles.freq_b + pair * angles.freq_pair);
      const int64_t axis = load_integer(angles.axis, pair * angles.axis_pair);
      float position = __int_as_float(0x7FC00000);
      if (axis >= 0 && axis <= 2) {
        position = load_number(angles.positions, token.b * angles.position_b +
                                                     token.l * angles.position_l +
                                                     axis * angles.position_column);
      }
      angle = position * freq;
    }
    float sin, cos;
    sincosf(angle, &sin, &cos);
    store_shared(rotations + 2 * i, make_float2(cos, sign * sin));
  }
}

struct PieceRotation {
  float4 pairs[2];  // two pairs each: cos, sin, cos, sin
};

// Of a thread's piece in token number `token` of the block.
__device__ __forceinline__ PieceRotation load_rotation(Shared<float> rotations,
                                                       const RowLayout& layout, int token,
                                                       int piece) {
  const Shared<float> mine = rotations + 8 * (token * layout.pieces + piece);
  return {{load_shared<float4>(mine), load_shared<float4>(mine + 4)}};
}

__device__ __forceinline__ void rotate_pair(float& a, float& b, float cos, float sin) {
  const float before = a;
  a = before * cos - b * sin;
  b = before * sin + b * cos;
}

// Every pair (a, b) of the piece becomes (a cos - b sin, a sin + b cos).
__device__ __forceinline__ void rotate_piece(Float8& x, const PieceRotation& rotation) {
  rotate_pair(x[0], x[1], rotation.pairs[0].x, rotation.pairs[0].y);
  rotate_pair(x[2], x[3], rotation.pairs[0].z, rotation.pairs[0].w);
  rotate_pair(x[4], x[5], rotation.pairs[1].x, rotation.pairs[1].y);
  rotate_pair(x[6], x[7], rotation.pairs[1].z, rotation.pairs[1].w);
}

}  // namespace lumina_kernels::cuda
