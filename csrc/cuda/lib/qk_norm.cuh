// Shared by the kernels that normalise queries and keys: means over a token's heads, the norm.
//
// A thread keeps the same 8 channels of N heads of T tokens in registers from the statistics to the
// output. The tokens share its loads of parameters, and the barriers.
#pragma once

#include "cuda/lib/rope.cuh"

namespace lumina_kernels::cuda {

// A thread has 1, 2, 4 up to `heads` heads. The most threads for a token, if a thread has fewer
// heads than that (`threads`), and if it has that many (`last_threads`); `fill` is the number of
// threads that several small tokens share a block up to.
struct NormLimits {
  int heads, threads, last_threads, fill;

  __host__ __device__ constexpr int bound(int n) const {
    return n < heads ? threads : last_threads;
  }
};

enum class NormKind : int32_t { kLayerAcrossHeads, kRmsPerHead, kRmsAcrossHeads };

// Heads of a token: H of q, then G of k.
struct NormShape {
  RowLayout layout;
  int H, G, K;
  NormKind norm;
  float eps;
  float q_share, k_share, head_share;  // 1 / (H * K), 1 / (G * K), 1 / K
};

// --- shared memory: the rotations, then a scratch for each of a token's means ---

// Floats in a scratch: two sums of q and of k for every warp, or T for every head and thread.
__host__ __device__ constexpr int scratch_floats(const RowLayout& layout, NormKind norm, int heads,
                                                 int T) {
  const int threads = layout.slots * layout.threads;
  return norm == NormKind::kRmsPerHead ? T * heads * threads : 4 * (threads / 32);
}

inline int64_t norm_floats(const RowLayout& layout, NormKind norm, int heads, int T) {
  return T * layout.slots * rotation_floats(layout.pieces) +
         3 * scratch_floats(layout, norm, heads, T);
}

struct NormShared {
  Shared<float> rotations, scratch[3];
};

// The parts of a block's shared memory, with N heads of T tokens per thread.
template <int T, int N>
__device__ __forceinline__ NormShared norm_shared(const NormShape& shape, Shared<float> memory) {
  const RowLayout& layout = shape.layout;
  const Shared<float> first = memory + 8 * T * layout.slots * layout.pieces;
  const int size = scratch_floats(layout, shape.norm, N, T);
  return {memory, {first, first + size, first + 2 * size}};
}

// --- means ---

// sums[m][n], over the 8 channels of head n, become means over all heads of q, or of k, of which
// there are none without kKeys. Two consecutive uses need a scratch each.
template <bool kKeys, int M, int N>
__device__ __forceinline__ void means_across_heads(float (&sums)[M][N], const NormShape& shape,
                                                   const RowPlace& at, Shared<float> scratch) {
  static_assert(M <= 2, "a scratch has 4 floats for a warp");
  constexpr int C = kKeys ? 2 * M : M;  // of q, then of k
  const int warps = shape.layout.threads / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total[C] = {};
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const bool of_q = !kKeys || at.head + n * shape.layout.step < shape.H;
      total[m] += of_q ? sums[m][n] : 0.0f;
      if (kKeys) total[M + m] += of_q ? 0.0f : sums[m][n];
    }
  }
  const float mine = warp_sums(total, lane);
  if (lane % (32 / C) == 0) scratch[C * warp + lane / (32 / C)] = mine;
  __syncthreads();
#pragma unroll
  for (int c = 0; c < C; ++c) total[c] = 0.0f;
  for (int w = at.slot * warps; w < (at.slot + 1) * warps; ++w) {
    if constexpr (C == 4) {
      const float4 four = load_shared<float4>(scratch + 4 * w);
      total[0] += four.x, total[1] += four.y, total[2] += four.z, total[3] += four.w;
    } else {
#pragma unroll
      for (int c = 0; c < C; ++c) total[c] += scratch[C * w + c];
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const float q = total[m] * shape.q_share, k = kKeys ? total[C - M + m] * shape.k_share : 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[m][n] = !kKeys || at.head + n * shape.layout.step < shape.H ? q : k;
    }
  }
}

// sums[m][n], over the 8 channels of head n, become means over that head.
template <int M, int N>
__device__ __forceinline__ void means_per_head(float (&sums)[M][N], const NormShape& shape,
                                               const RowPlace& at, Shared<float> scratch) {
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      scratch[(m * N + n) * threads + threadIdx.x] = sums[m][n];
      sums[m][n] = 0.0f;
    }
  }
  __syncthreads();
  if (at.head == kNoHead) return;
  const Shared<float> head = scratch + threadIdx.x - at.piece;
  for (int i = 0; i < shape.layout.pieces; ++i) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) sums[m][n] += head[(m * N + n) * threads + i];
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums[m][n] *= shape.head_share;
  }
}

// --- the norm ---

// How many channels of the piece of head n exist; 0 or less if none.
__device__ __forceinline__ int channels(const NormShape& shape, const RowPlace& at, int n) {
  const int head = at.head + n * shape.layout.step;
  return head < shape.H + shape.G ? shape.K - 8 * at.piece : 0;
}

__device__ __forceinline__ float sum_of_products(const Float8& a, const Float8& b) {
  float sum = 0.0f;
  add_products(sum, a, b);
  return sum;
}

// x becomes (x - mean) * rstd, without the mean for an RMS norm, and 0 beyond the last channel.
// Uses the first two scratches.
template <bool kKeys, int T, int N>
__device__ __forceinline__ void normalise(Float8 (&x)[T][N], float (&rstd)[T][N],
                                          const NormShape& shape, const RowPlace& at,
                                          const NormShared& shared) {
  float sums[T][N];
  const auto for_all = [](auto f) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
#pragma unroll
      for (int n = 0; n < N; ++n) f(t, n);
    }
  };
  if (shape.norm == NormKind::kLayerAcrossHeads) {
    for_all([&](int t, int n) {
      sums[t][n] = 0.0f;
      add_columns(sums[t][n], x[t][n]);
    });
    means_across_heads<kKeys>(sums, shape, at, shared.scratch[0]);
    for_all([&](int t, int n) { x[t][n] = x[t][n] - sums[t][n]; });
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int count = channels(shape, at, n);
      if (count >= 8) continue;
#pragma unroll
      for (int t = 0; t < T; ++t) {
        x[t][n] = by_column([&](int i) { return i < count ? x[t][n][i] : 0.0f; });
      }
    }
  }
  for_all([&](int t, int n) { sums[t][n] = sum_of_products(x[t][n], x[t][n]); });
  if (shape.norm == NormKind::kRmsPerHead) {
    means_per_head(sums, shape, at, shared.scratch[1]);
  } else {
    means_across_heads<kKeys>(sums, shape, at, shared.scratch[1]);
  }
  for_all([&](int t, int n) {
    rstd[t][n] = rsqrtf(sums[t][n] + shape.eps);
    x[t][n] *= rstd[t][n];
  });
}

// Where 8 channels of a weight or bias are, for head `head` of its tensor.
__device__ __forceinline__ int64_t parameter_at(const NormShape& shape, const RowPlace& at,
                                                int head) {
  const int row = shape.norm == NormKind::kRmsPerHead ? 0 : head;
  return static_cast<int64_t>(row) * shape.K + 8 * at.piece;
}

struct NormParameters {
  Values q_weight, q_bias, k_weight, k_bias;  // each may be missing
};

// x, the normalised pieces of head n, become x * weight + bias.
template <int T, int N>
__device__ __forceinline__ void scale_pieces(Float8 (&x)[T][N], const NormParameters& parameters,
                                             const NormShape& shape, const RowPlace& at, int n) {
  const int head = at.head + n * shape.layout.step, count = channels(shape, at, n);
  const bool of_q = head < shape.H;
  const Values weight = select(of_q, parameters.q_weight, parameters.k_weight);
  const Values bias = select(of_q, parameters.q_bias, parameters.k_bias);
  const int own = of_q ? head : head - shape.H;  // its index in q, or in k
  const int64_t start = parameter_at(shape, at, own);
  if (is_there(weight)) {
    const Float8 factor = to_float8(load_bits8(weight, start, count), weight.dtype);
#pragma unroll
    for (int t = 0; t < T; ++t) x[t][n] *= factor;
  }
  if (is_there(bias)) {
    const Float8 term = to_float8(load_bits8(bias, start, count), bias.dtype);
#pragma unroll
    for (int t = 0; t < T; ++t) x[t][n] += term;
  }
}

// x becomes rotate(norm(x) * weight + bias) for the heads of q and k. Contains the barrier between
// filling the rotations and using them.
template <int T, int N>
__device__ __forceinline__ void norm_rotate(Float8 (&x)[T][N], const NormParameters& parameters,
                                            const NormShape& shape, const RowPlace& at,
                                            const NormShared& shared) {
  float rstd[T][N];
  normalise<true>(x, rstd, shape, at, shared);
#pragma unroll
  for (int n = 0; n < N; ++n) scale_pieces(x, parameters, shape, at, n);
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const PieceRotation rotation =
        load_rotation(shared.rotations, shape.layout, at.slot * T + t, at.piece);
#pragma unroll
    for (int n = 0; n < N; ++n) rotate_piece(x[t][n], rotation);
  }
}

// Where the piece of head n of a token is, in q or k.
__device__ __forceinline__ int64_t piece_at(const HeadsView& q, const HeadsView& k,
                                            const Token& token, const NormShape& shape,
                                            const RowPlace& at, int n) {
  const int head = at.head + n * shape.layout.step;
  const bool of_q = head < shape.H;
  return select(of_q, q, k).at(token.b, token.l, of_q ? head : head - shape.H) + 8 * at.piece;
}

// Loads the pieces of a token's heads; zeros in place of q or k if these are not wanted. As Bits8,
// or as Float8 in kernels that go over several tokens and are short of registers.
template <class V, int N>
__device__ __forceinline__ void load_heads(V (&x)[N], const HeadsView& q, const HeadsView& k,
                                           const Token& token, bool want_q, bool want_k,
                                           const NormShape& shape, const RowPlace& at) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const bool of_q = at.head + n * shape.layout.step < shape.H;
    const int count = (of_q ? want_q : want_k) ? channels(shape, at, n) : 0;
    load8(select(of_q, q.values, k.values), piece_at(q, k, token, shape, at, n), count, x[n]);
  }
}

template <int N>
__device__ __forceinline__ void convert_heads(const Bits8 (&bits)[N], Float8 (&x)[N],
                                              const HeadsView& q, const HeadsView& k,
                                              const NormShape& shape, const RowPlace& at) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const bool of_q = at.head + n * shape.layout.step < shape.H;
    x[n] = to_float8(bits[n], of_q ? q.values.dtype : k.values.dtype);
  }
}

template <int N>
__device__ __forceinline__ void store_heads(const Float8 (&x)[N], const HeadsView& q,
                                            const HeadsView& k, const Token& token,
                                            const NormShape& shape, const RowPlace& at) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const bool of_q = at.head + n * shape.layout.step < shape.H;
    store8_branching(select(of_q, q.values, k.values), piece_at(q, k, token, shape, at, n),
                     channels(shape, at, n), x[n]);
  }
}

// --- the forward: T tokens of a block's slot ---

// As many as keep 4 pieces of a thread in flight at most.
__host__ __device__ constexpr int fwd_tokens(int heads) { return heads < 4 ? 2 : 1; }

template <int T>
struct FwdTokens {
  Token tokens[T];
  bool there[T];
};

template <int T>
__device__ __forceinline__ FwdTokens<T> fwd_tokens_at(const RowLayout& layout, const RowPlace& at,
                                                      int64_t tokens, int64_t L) {
  FwdTokens<T> result;
  const uint32_t first = (blockIdx.x * layout.slots + at.slot) * T;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    result.there[t] = first + t < tokens;
    const Token& last = result.tokens[t > 0 ? t - 1 : 0];
    if (t == 0) {
      result.tokens[t] = token_of(result.there[t] ? first : tokens - 1, L);
    } else if (!result.there[t]) {
      result.tokens[t] = last;
    } else if (last.l + 1 < L) {
      result.tokens[t] = {last.b, last.l + 1};
    } else {
      result.tokens[t] = {last.b + 1, 0};
    }
  }
  return result;
}

}  // namespace lumina_kernels::cuda
