// CUDA kernel of rope_table: a block rotates all heads of q and k of some tokens.
#pragma once

#include "cuda/lib/rope_table.cuh"

namespace lumina_kernels::cuda {

constexpr int kRopeTableThreads = 256;

// A thread has 8 neighbouring channels if the two of a pair are neighbours. With `half` these are
// channels / 2 apart, and a thread has 4 channels and their partners, or 8 that are not rotated.
// Fours are aligned if 8 divides `channels`, and `vectors` of q, k and the tables then refers to 4
// values.
struct RopeTableParams {
  HeadsView q, k, q_out, k_out;
  TablesView tables;
  RowLayout layout;
  int64_t tokens, L;
  int H, G, K;
};

inline int64_t rope_table_pieces(int64_t K, int64_t channels, bool half) {
  return half ? ceil_div(channels / 2, 4) + ceil_div(K - channels, 8) : ceil_div(K, 8);
}

inline LaunchConfig rope_table_config(const RowLayout& layout, int64_t tokens, int64_t pieces) {
  return token_config(layout, tokens, pieces, 0);
}

// The channels of a thread: two times 4 neighbouring ones, of which the first `count` exist.
struct RotatedPiece {
  int first[2], count[2];

  __device__ __forceinline__ int channel(int k) const { return first[k / 4] + k % 4; }
};

__device__ __forceinline__ RotatedPiece neighbours(int first, int end) {
  return {{first, first + 4}, {end - first, end - first - 4}};
}

// kPlain: all channels are rotated, by tables with an entry for each, without gaps, for all heads.
// kHalf is tables.half.
template <bool kPlain, bool kHalf>
__device__ __forceinline__ RotatedPiece piece_of(int number, const RopeTableParams& p) {
  const int channels = kPlain ? p.K : p.tables.channels, M = channels / 2;
  if (!kHalf) return neighbours(8 * number, p.K);
  const int first = 4 * number;
  if (kPlain || first < M) return {{first, M + first}, {M - first, M - first}};
  return neighbours(channels + 8 * (number - (M + 3) / 4), p.K);
}

// Twice 4 values, as Bits8 has those of load_bits8.
__device__ __forceinline__ Bits8 load_fours(const Values& x, int64_t i, const RotatedPiece& piece) {
  const int64_t start[2] = {i + piece.first[0], i + piece.first[1]};
  const bool vector = x.vectors && piece.count[0] >= 4 && piece.count[1] >= 4;
  if (x.dtype == Dtype::kFloat) {
    if (vector) {
      return {load_global<uint4>(x.data + 4 * start[0]), load_global<uint4>(x.data + 4 * start[1])};
    }
    const auto load = [&](int k) -> uint32_t {
      const int64_t from = 4 * (start[k / 4] + k % 4);
      return k % 4 < piece.count[k / 4] ? load_global<unsigned>(x.data + from) : 0;
    };
    return {make_uint4(load(0), load(1), load(2), load(3)),
            make_uint4(load(4), load(5), load(6), load(7))};
  }
  Bits8 bits;
  if (vector) {
    const uint2 a = load_global<uint2>(x.data + 2 * start[0]);
    const uint2 b = load_global<uint2>(x.data + 2 * start[1]);
    bits.first = make_uint4(a.x, a.y, b.x, b.y);
  } else {
    const auto load = [&](int k) -> uint32_t {
      const int64_t from = 2 * (start[k / 4] + k % 4);
      return k % 4 < piece.count[k / 4] ? load_global<unsigned short>(x.data + from) : 0;
    };
    bits.first = make_uint4(load(0) | load(1) << 16, load(2) | load(3) << 16,
                            load(4) | load(5) << 16, load(6) | load(7) << 16);
  }
  return bits;
}

__device__ __forceinline__ void store4(const Values& x, int64_t i, int count, const float* in) {
  if (!x.vectors || count < 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < count) store1(x, i + k, in[k]);
    }
  } else if (x.dtype == Dtype::kFloat) {
    store_global(x.data + 4 * i, make_float4(in[0], in[1], in[2], in[3]));
  } else {
    store_global(x.data + 2 * i,
                 make_uint2(pack2(in[0], in[1], x.dtype), pack2(in[2], in[3], x.dtype)));
  }
}

// A piece of the values from element i on.
template <bool kHalf>
__device__ __forceinline__ Bits8 load_piece(const Values& x, int64_t i, const RotatedPiece& piece) {
  return kHalf ? load_fours(x, i, piece) : load_bits8(x, i + piece.first[0], piece.count[0]);
}

__device__ __forceinline__ void store_piece(const Values& x, int64_t i, const RotatedPiece& piece,
                                            bool half, const Float8& in) {
  if (half) {
    store4(x, i + piece.first[0], piece.count[0], in.columns);
    store4(x, i + piece.first[1], piece.count[1], in.columns + 4);
  } else {
    store8(x, i + piece.first[0], piece.count[0], in);
  }
}

// f(i, j) for the pairs of values i and j of a piece.
template <bool kHalf, class F>
__device__ __forceinline__ void for_pairs(F f) {
  if (kHalf) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(i, i + 4);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2) f(i, i + 1);
  }
}

// The entries of a piece, in a row that starts at element i; of pairs that are not rotated, zeros.
template <bool kHalf>
__device__ __forceinline__ Float8 load_entries(const TableView& table, int64_t i,
                                               const RotatedPiece& piece,
                                               const RopeTableParams& p) {
  Float8 out;
  for_pairs<kHalf>([&](int a, int b) {
    const int first = piece.channel(a), second = piece.channel(b);
    const bool there = second < p.tables.channels;
    const int entry = p.tables.pairs && !kHalf ? first / 2 : first;
    out[a] = there ? load_entry(table, i + entry * table.step) : 0.0f;
    out[b] = there && !p.tables.pairs ? load_entry(table, i + second * table.step) : out[a];
  });
  return out;
}

// (a, b) -> (a cos_a - b sin_a, b cos_b + a sin_b), or, if `backward`, with sines (-sin_b, -sin_a).
// a and b are values i and j of a piece.
__device__ __forceinline__ void rotate_values(Float8& x, int i, int j, const Float8& cos,
                                              const Float8& sin, bool backward) {
  const float a = x[i], b = x[j];
  x[i] = a * cos[i] - b * (backward ? -sin[j] : sin[i]);
  x[j] = b * cos[j] + a * (backward ? -sin[i] : sin[j]);
}

// x -> x * cos + rot(x) * sin for q and k, or, if `backward`, the gradient of x from that of the
// result.
template <bool kPlain, bool kHalf>
__global__ void __launch_bounds__(kRopeTableThreads, 3) rope_table_kernel(const RopeTableParams p) {
  RowPlace at = row_place(p.layout);
  at.piece += static_cast<int>(blockIdx.y) * p.layout.pieces;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * p.layout.slots + at.slot;
  if (number >= p.tokens || at.head == kNoHead) return;
  const Token token = token_of(number, p.L);
  const RotatedPiece piece = piece_of<kPlain, kHalf>(at.piece, p);
  const int heads = p.H + p.G;
  // That a thread rotates at a time, so that their loads overlap.
  constexpr int kHeads = kPlain ? 2 : 1;
  Bits8 bits[kHeads];
  const auto load = [&](int first) {
#pragma unroll
    for (int n = 0; n < kHeads; ++n) {
      const int row = first + n * p.layout.step;
      if (row >= heads) break;
      const HeadsView from = select(row < p.H, p.q, p.k);
      const int64_t start = from.at(token.b, token.l, row < p.H ? row : row - p.H);
      bits[n] = load_piece<kHalf>(from.values, start, piece);
    }
  };
  load(at.head);
  Float8 cos, sin;
  const auto load_tables = [&](int head) {
    const int64_t cos_row = p.tables.cos.row(token, head), sin_row = p.tables.sin.row(token, head);
    if (kPlain) {
      const Values &cosines = p.tables.cos.values, &sines = p.tables.sin.values;
      const Bits8 cos_bits = load_piece<kHalf>(cosines, cos_row, piece);
      const Bits8 sin_bits = load_piece<kHalf>(sines, sin_row, piece);
      cos = to_float8(cos_bits, cosines.dtype);
      sin = to_float8(sin_bits, sines.dtype);
    } else {
      cos = load_entries<kHalf>(p.tables.cos, cos_row, piece, p);
      sin = load_entries<kHalf>(p.tables.sin, sin_row, piece, p);
    }
  };
  if (kPlain || !p.tables.per_head) load_tables(0);
  for (int first = at.head; first < heads;) {
#pragma unroll
    for (int n = 0; n < kHeads; ++n) {
      const int row = first + n * p.layout.step;
      if (row >= heads) break;
      const bool of_q = row < p.H;
      const int head = of_q ? row : row - p.H;
      if (!kPlain && p.tables.per_head) load_tables(head);
      Float8 x = to_float8(bits[n], of_q ? p.q.values.dtype : p.k.values.dtype);
      for_pairs<kHalf>([&](int i, int j) {
        if (kPlain || piece.channel(j) < p.tables.channels)
          rotate_values(x, i, j, cos, sin, p.tables.backward);
      });
      const HeadsView to = select(of_q, p.q_out, p.k_out);
      store_piece(to.values, to.at(token.b, token.l, head), piece, kHalf, x);
    }
    first += kHeads * p.layout.step;
    if (first < heads) load(first);
  }
}

}  // namespace lumina_kernels::cuda
