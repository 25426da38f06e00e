// CUDA kernels of qk_norm_rope_table: those of qk_norm_rope3d with a rotation by tables.
#pragma once

#include "cuda/lib/qk_norm_bwd.cuh"
#include "cuda/lib/rope_table.cuh"

namespace lumina_kernels::cuda {

// --- shared memory: an exchange of 8 floats a thread and token, the entries of tables, then the
// norm's ---

// The entries of 8 channels: 8 cosines, and 8 sines as their partners are multiplied with them. Of
// every piece of a slot's T tokens, or, where the heads' differ, of every thread.
inline int64_t entry_floats(const RowLayout& layout, bool per_head, int T) {
  return 16 * layout.slots * (per_head ? layout.threads : T * layout.pieces);
}

inline int64_t table_floats(const RowLayout& layout, NormKind norm, int heads, bool per_head,
                            int T) {
  return 8 * T * layout.slots * layout.threads + entry_floats(layout, per_head, T) +
         norm_floats(layout, norm, heads, T);
}

struct TableShared {
  Shared<float> exchange, entries;
  NormShared norm;
};

template <int T, int N>
__device__ __forceinline__ TableShared table_shared(const NormShape& shape, bool per_head,
                                                    Shared<float> memory) {
  const int threads = static_cast<int>(blockDim.x);
  const int count = per_head ? threads : shape.layout.slots * T * shape.layout.pieces;
  const Shared<float> entries = memory + 8 * T * threads;
  return {memory, entries, norm_shared<T, N>(shape, entries + 16 * count)};
}

// --- the rotation ---

// The other channel of a pair.
__device__ __forceinline__ int partner_of(int channel, const TablesView& tables) {
  const int M = tables.channels / 2;
  if (!tables.half) return channel ^ 1;
  return channel < M ? channel + M : channel - M;
}

// (a, b) -> (a cos_a - b sin_a, b cos_b + a sin_b), or backward with sines (-sin_b, -sin_a): the
// entries of one channel, as `to` has them.
__device__ __forceinline__ void fill_entry(const TablesView& tables, const Token& token, int head,
                                           int channel, Shared<float> to) {
  if (channel >= tables.channels) {
    to[channel % 8] = to[8 + channel % 8] = 0.0f;  // not used
    return;
  }
  const int partner = partner_of(channel, tables);
  const int pair = tables.half ? min(channel, partner) : channel / 2;
  const int cos = tables.pairs ? pair : channel;
  const int sin = tables.pairs ? pair : tables.backward ? partner : channel;
  const uint64_t sin_bits =
      load_entry_bits(tables.sin, tables.sin.row(token, head) + sin * tables.sin.step);
  const uint64_t cos_bits =
      load_entry_bits(tables.cos, tables.cos.row(token, head) + cos * tables.cos.step);
  const float value = entry_of(sin_bits, tables.sin);
  to[channel % 8] = entry_of(cos_bits, tables.cos);
  to[8 + channel % 8] = (channel < partner) == tables.backward ? value : -value;
}

// The entries that all heads of a slot's T tokens share. A barrier must follow.
template <int T>
__device__ __forceinline__ void fill_entries(const TablesView& tables, const Token (&tokens)[T],
                                             const RowLayout& layout, const RowPlace& at,
                                             const TableShared& shared) {
  if (tables.per_head) return;
  const int width = 8 * layout.pieces;
  const Shared<float> first = shared.entries + at.slot * 2 * T * width;
  for (int i = at.thread; i < T * width; i += layout.threads) {
    Token token = tokens[0];
    int channel = i;
#pragma unroll
    for (int t = 1; t < T; ++t) {
      if (i >= t * width) token = tokens[t], channel = i - t * width;
    }
    fill_entry(tables, token, 0, channel, first + 16 * (i / 8));
  }
}

__device__ __forceinline__ Float8 load_shared8(Shared<float> from) {
  const float4 lo = load_shared<float4>(from), hi = load_shared<float4>(from + 4);
  return {{lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w}};
}

// The other channels of a thread's pairs. With `half` they are in other threads' part of the
// exchange, in which the row of the head is.
__device__ __forceinline__ Float8 partners_of(const Float8& x, const TablesView& tables, int first,
                                              Shared<float> row) {
  if (!tables.half) return by_column([&](int k) { return x[k ^ 1]; });
  if (tables.channels % 8 == 0) {  // fours of neighbours have fours as partners
    const float4 lo = load_shared<float4>(row + partner_of(first, tables));
    const float4 hi = load_shared<float4>(row + partner_of(first + 4, tables));
    return {{lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w}};
  }
  return by_column([&](int k) -> float {
    const int channel = first + k;
    return channel < tables.channels ? static_cast<float>(row[partner_of(channel, tables)]) : 0.0f;
  });
}

// Rotates the pieces of head n of T tokens. Where the channels of a pair are not neighbours,
// threads see each other's through the exchange; all threads of a block must be here.
template <int T, int N>
__device__ __forceinline__ void rotate_by_tables(Float8 (&x)[T][N], const TablesView& tables,
                                                 const Token (&tokens)[T], const NormShape& shape,
                                                 const RowPlace& at, int n,
                                                 const TableShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto mine = [&](int t) { return shared.exchange + 8 * (t * threads + thread); };
  if (tables.half) {
    __syncthreads();  // what was there has been read
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const Float8& own = x[t][n];
      store_shared(mine(t), make_float4(own[0], own[1], own[2], own[3]));
      store_shared(mine(t) + 4, make_float4(own[4], own[5], own[6], own[7]));
    }
    __syncthreads();
  }
  const int head = at.head + n * shape.layout.step, first = 8 * at.piece;
  const int left = tables.channels - first;  // channels that are rotated
  if (at.head == kNoHead || head >= shape.H + shape.G || left <= 0) return;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const int own = tables.per_head ? thread : (at.slot * T + t) * shape.layout.pieces + at.piece;
    const Shared<float> entries = shared.entries + 16 * own;
    if (tables.per_head) {
#pragma unroll 1
      for (int k = 0; k < 8; ++k) {
        fill_entry(tables, tokens[t], head < shape.H ? head : head - shape.H, first + k, entries);
      }
    }
    const Float8 cos = load_shared8(entries), sin = load_shared8(entries + 8);
    const Float8 other = partners_of(x[t][n], tables, first, mine(t) - first);
    if (left >= 8) {
      x[t][n] = by_column([&](int k) { return x[t][n][k] * cos[k] + other[k] * sin[k]; });
    } else {
      x[t][n] = by_column(
          [&](int k) { return k < left ? x[t][n][k] * cos[k] + other[k] * sin[k] : x[t][n][k]; });
    }
  }
}

struct QkNormRopeTableFwdParams {
  HeadsView q, k, q_out, k_out;
  NormParameters parameters;
  TablesView tables;
  NormShape shape;
  int64_t tokens, L;
};

// x -> rotate(norm(x) * weight + bias) for q and k, with the rotation of rope_table.
template <int N>
__global__ void __launch_bounds__(kFwdLimits.bound(N), N == 2 ? 2 : 1)
    qk_norm_rope_table_kernel(const QkNormRopeTableFwdParams p) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  constexpr int T = fwd_tokens(N);
  const RowPlace at = row_place(p.shape.layout);
  const TableShared shared = table_shared<T, N>(p.shape, p.tables.per_head, memory);
  const FwdTokens<T> of = fwd_tokens_at<T>(p.shape.layout, at, p.tokens, p.L);
  Bits8 bits[T][N];
#pragma unroll
  for (int t = 0; t < T; ++t) {
    load_heads(bits[t], p.q, p.k, of.tokens[t], of.there[t], of.there[t], p.shape, at);
  }
  fill_entries(p.tables, of.tokens, p.shape.layout, at, shared);
  Float8 x[T][N];
#pragma unroll
  for (int t = 0; t < T; ++t) convert_heads(bits[t], x[t], p.q, p.k, p.shape, at);
  float rstd[T][N];
  normalise<true>(x, rstd, p.shape, at, shared.norm);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    scale_pieces(x, p.parameters, p.shape, at, n);
    rotate_by_tables(x, p.tables, of.tokens, p.shape, at, n, shared);
  }
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (of.there[t]) store_heads(x[t], p.q_out, p.k_out, of.tokens[t], p.shape, at);
  }
}

struct QkNormRopeTableBwdParams {
  QkNormBwdParams rows;  // without angles and windows
  TablesView tables;
};

// dx of `chunk` tokens, and the sums of dweight and dbias over them (`norm_bwd`).
template <int N>
__global__ void __launch_bounds__(kBwdLimits.bound(N), N == 1 ? 2 : 1)
    qk_norm_rope_table_bwd_kernel(const QkNormRopeTableBwdParams params) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  const QkNormBwdParams& p = params.rows;
  const RowLayout& layout = p.shape.layout;
  const RowPlace at = row_place(layout);
  const TableShared shared = table_shared<1, N>(p.shape, params.tables.per_head, memory);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.chunk;
  const int64_t end = min(first + p.chunk, p.tokens);
  Float8 dweight[N] = {}, dbias[N] = {};
  for (int64_t start = first; start < end; start += layout.slots) {
    const bool there = start + at.slot < end;
    const Token tokens[] = {token_of(there ? start + at.slot : end - 1, p.L)};
    const Token& token = tokens[0];
    Float8 rows[1][N], gradients[1][N];
    Float8(&x)[N] = rows[0];
    Float8(&d)[N] = gradients[0];
    load_heads(x, p.x, p.x, token, there, false, p.shape, at);
    load_heads(d, p.dout, p.dout, token, there, false, p.shape, at);
    fill_entries(params.tables, tokens, layout, at, shared);
    float rstd[1][N];
    normalise<false>(rows, rstd, p.shape, at, shared.norm);
    norm_bwd(x, rstd[0], d, dweight, dbias, there, p, at, shared.norm, [&](int n) {
      rotate_by_tables(gradients, params.tables, tokens, p.shape, at, n, shared);
    });
    if (there) store_heads(x, p.dx, p.dx, token, p.shape, at);
  }
  const int64_t partial = static_cast<int64_t>(blockIdx.x) * p.sums * p.width;
  if (p.sums > 0) store_sums(dweight, partial, p, at, memory);
  if (p.sums > 1) store_sums(dbias, partial + p.width, p, at, memory);
}

}  // namespace lumina_kernels::cuda
