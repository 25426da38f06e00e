// CUDA kernels of qk_norm_rope_table: those of qk_norm_rope3d with a rotation by tables.
#pragma once

#include "cuda/lib/qk_norm_bwd.cuh"
#include "cuda/lib/rope_table.cuh"

namespace lumina_kernels::cuda {

// --- shared memory: an exchange of 8 floats a thread, the entries of tables, then the norm's ---

// The entries of 8 channels: 8 cosines, and 8 sines as their partners are multiplied with them. Of
// every piece of a slot's token, or, where the heads' differ, of every thread.
inline int64_t entry_floats(const RowLayout& layout, bool per_head) {
  return 16 * layout.slots * (per_head ? layout.threads : layout.pieces);
}

inline int64_t table_floats(const RowLayout& layout, NormKind norm, int heads, bool per_head) {
  return 8 * layout.slots * layout.threads + entry_floats(layout, per_head) +
         norm_floats(layout, norm, heads);
}

struct TableShared {
  Shared<float> exchange, entries;  // entries: of this thread's channels
  NormShared norm;
};

template <int N>
__device__ __forceinline__ TableShared table_shared(const NormShape& shape, bool per_head,
                                                    const RowPlace& at, Shared<float> memory) {
  const int threads = static_cast<int>(blockDim.x), pieces = shape.layout.pieces;
  const Shared<float> entries = memory + 8 * threads;
  const int mine = per_head ? static_cast<int>(threadIdx.x) : at.slot * pieces + at.piece;
  const int count = per_head ? threads : shape.layout.slots * pieces;
  return {memory, entries + 16 * mine, norm_shared<N>(shape, entries + 16 * count)};
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

// The entries that all heads of a slot's token share. A barrier must follow.
__device__ __forceinline__ void fill_entries(const TablesView& tables, const Token& token,
                                             const RowLayout& layout, const RowPlace& at,
                                             const TableShared& shared) {
  if (tables.per_head) return;
  const Shared<float> first = shared.entries - 16 * at.piece;
  for (int i = at.thread; i < 8 * layout.pieces; i += layout.threads) {
    fill_entry(tables, token, 0, i, first + 16 * (i / 8));
  }
}

__device__ __forceinline__ Float8 load_shared8(Shared<float> from) {
  const float4 lo = load_shared<float4>(from), hi = load_shared<float4>(from + 4);
  return {{lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w}};
}

// Rotates the piece of head n of a token. Where the channels of a pair are not neighbours, threads
// see each other's through the exchange; all threads of a block must be here.
__device__ __forceinline__ void rotate_by_tables(Float8& x, const TablesView& tables,
                                                 const Token& token, const NormShape& shape,
                                                 const RowPlace& at, int n,
                                                 const TableShared& shared) {
  const Shared<float> mine = shared.exchange + 8 * static_cast<int>(threadIdx.x);
  if (tables.half) {
    __syncthreads();  // what was there has been read
    store_shared(mine, make_float4(x[0], x[1], x[2], x[3]));
    store_shared(mine + 4, make_float4(x[4], x[5], x[6], x[7]));
    __syncthreads();
  }
  const int head = at.head + n * shape.layout.step;
  const int left = tables.channels - 8 * at.piece;  // channels that are rotated
  if (at.head == kNoHead || head >= shape.H + shape.G || left <= 0) return;
  if (tables.per_head) {
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      fill_entry(tables, token, head < shape.H ? head : head - shape.H, 8 * at.piece + k,
                 shared.entries);
    }
  }
  const Float8 cos = load_shared8(shared.entries), sin = load_shared8(shared.entries + 8);
  const Shared<float> row = mine - 8 * at.piece;
  x = by_column([&](int k) {
    if (k >= left) return x[k];
    float other = x[k ^ 1];
    if (tables.half) other = row[partner_of(8 * at.piece + k, tables)];
    return x[k] * cos[k] + other * sin[k];
  });
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
__global__ void __launch_bounds__(kFwdLimits.bound(N))
    qk_norm_rope_table_kernel(const QkNormRopeTableFwdParams p) {
  LUMINA_DYNAMIC_SHARED(float, memory);
  const RowLayout& layout = p.shape.layout;
  const RowPlace at = row_place(layout);
  const TableShared shared = table_shared<N>(p.shape, p.tables.per_head, at, memory);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * layout.slots + at.slot;
  const bool there = number < p.tokens;
  const Token token = token_of(there ? number : p.tokens - 1, p.L);
  Bits8 bits[N];
  load_heads(bits, p.q, p.k, token, there, there, p.shape, at);
  fill_entries(p.tables, token, layout, at, shared);
  Float8 x[N];
  convert_heads(bits, x, p.q, p.k, p.shape, at);
  float rstd[N];
  normalise(x, rstd, p.shape, at, shared.norm);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    scale_piece(x[n], p.parameters, p.shape, at, n);
    rotate_by_tables(x[n], p.tables, token, p.shape, at, n, shared);
  }
  if (there) store_heads(x, p.q_out, p.k_out, token, p.shape, at);
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
  const TableShared shared = table_shared<N>(p.shape, params.tables.per_head, at, memory);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.chunk;
  const int64_t end = min(first + p.chunk, p.tokens);
  Float8 dweight[N] = {}, dbias[N] = {};
  for (int64_t start = first; start < end; start += layout.slots) {
    const bool there = start + at.slot < end;
    const Token token = token_of(there ? start + at.slot : end - 1, p.L);
    Float8 x[N], d[N];
    load_heads(x, p.x, p.x, token, there, false, p.shape, at);
    load_heads(d, p.dout, p.dout, token, there, false, p.shape, at);
    fill_entries(params.tables, token, layout, at, shared);
    float rstd[N];
    normalise(x, rstd, p.shape, at, shared.norm);
    norm_bwd(x, rstd, d, dweight, dbias, there, p, at, shared.norm,
             [&](int n) { rotate_by_tables(d[n], params.tables, token, p.shape, at, n, shared); });
    if (there) store_heads(x, p.dx, p.dx, token, p.shape, at);
  }
  const int64_t partial = static_cast<int64_t>(blockIdx.x) * p.sums * p.width;
  if (p.sums > 0) store_sums(dweight, partial, p, at, memory);
  if (p.sums > 1) store_sums(dbias, partial + p.width, p, at, memory);
}

}  // namespace lumina_kernels::cuda
