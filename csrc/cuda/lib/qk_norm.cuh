// Shared by the kernels that normalise queries and keys: means over a token's heads, the norm.
//
// A thread keeps the same 8 channels of N heads of a token in registers from the statistics to the
// output.
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

// Floats in a scratch: two sums of q and of k for every warp, or one for every head and thread.
__host__ __device__ constexpr int scratch_floats(const RowLayout& layout, NormKind norm,
                                                 int heads) {
  const int threads = layout.slots * layout.threads;
  return norm == NormKind::kRmsPerHead ? heads * threads : 4 * (threads / 32);
}

inline int64_t norm_floats(const RowLayout& layout, NormKind norm, int heads) {
  return layout.slots * rotation_floats(layout.pieces) + 3 * scratch_floats(layout, norm, heads);
}

struct NormShared {
  Shared<float> rotations, scratch[3];
};

// The parts of a block's shared memory, with N heads per thread.
template <int N>
__device__ __forceinline__ NormShared norm_shared(const NormShape& shape, Shared<float> memory) {
  const RowLayout& layout = shape.layout;
  const Shared<float> first = memory + 8 * layout.slots * layout.pieces;
  const int size = scratch_floats(layout, shape.norm, N);
  return {memory, {first, first + size, first + 2 * size}};
}

// --- means ---

// sums[m][n], over the 8 channels of head n, become means over all heads of q, or of k. Two
// consecutive uses need a scratch each.
template <int M, int N>
__device__ __forceinline__ void means_across_heads(float (&sums)[M][N], const NormShape& shape,
                                                   const RowPlace& at, Shared<float> scratch) {
  const int warps = shape.layout.threads / 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float q = 0.0f, k = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      (at.head + n * shape.layout.step < shape.H ? q : k) += sums[m][n];
    }
    q = warp_sum(q);
    if (shape.G > 0) k = warp_sum(k);
    if (threadIdx.x % 32 == 0) {
      scratch[4 * warp + 2 * m] = q;
      scratch[4 * warp + 2 * m + 1] = k;
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float q = 0.0f, k = 0.0f;
    for (int w = at.slot * warps; w < (at.slot + 1) * warps; ++w) {
      q += scratch[4 * w + 2 * m];
      k += scratch[4 * w + 2 * m + 1];
    }
    q *= shape.q_share;
    k *= shape.k_share;
#pragma unroll
    for (int n = 0; n < N; ++n) sums[m][n] = at.head + n * shape.layout.step < shape.H ? q : k;
  }
}

// sums[n], over the 8 channels of head n, become means over that head.
template <int N>
__device__ __forceinline__ void means_per_head(float (&sums)[N], const NormShape& shape,
                                               const RowPlace& at, Shared<float> scratch) {
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int n = 0; n < N; ++n) scratch[n * threads + threadIdx.x] = sums[n];
  __syncthreads();
  if (at.head == kNoHead) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Shared<float> head = scratch + n * threads + threadIdx.x - at.piece;
    float total = 0.0f;
    for (int i = 0; i < shape.layout.pieces; ++i) total += head[i];
    sums[n] = total * shape.head_share;
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
template <int N>
__device__ __forceinline__ void normalise(Float8 (&x)[N], float (&rstd)[N], const NormShape& shape,
                                          const RowPlace& at, const NormShared& shared) {
  float sums[1][N];
  if (shape.norm == NormKind::kLayerAcrossHeads) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[0][n] = 0.0f;
      add_columns(sums[0][n], x[n]);
    }
    means_across_heads(sums, shape, at, shared.scratch[0]);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int count = channels(shape, at, n);
      x[n] = by_column([&](int i) { return i < count ? x[n][i] - sums[0][n] : 0.0f; });
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) sums[0][n] = sum_of_products(x[n], x[n]);
  if (shape.norm == NormKind::kRmsPerHead) {
    means_per_head(sums[0], shape, at, shared.scratch[1]);
  } else {
    means_across_heads(sums, shape, at, shared.scratch[1]);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    rstd[n] = rsqrtf(sums[0][n] + shape.eps);
    x[n] *= rstd[n];
  }
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

// x, the normalised piece of head n, becomes x * weight + bias.
__device__ __forceinline__ void scale_piece(Float8& x, const NormParameters& parameters,
                                            const NormShape& shape, const RowPlace& at, int n) {
  const int head = at.head + n * shape.layout.step, count = channels(shape, at, n);
  const bool of_q = head < shape.H;
  const Values weight = select(of_q, parameters.q_weight, parameters.k_weight);
  const Values bias = select(of_q, parameters.q_bias, parameters.k_bias);
  const int own = of_q ? head : head - shape.H;  // its index in q, or in k
  const int64_t start = parameter_at(shape, at, own);
  if (is_there(weight)) x *= load8(weight, start, count);
  if (is_there(bias)) x += load8(bias, start, count);
}

// x becomes rotate(norm(x) * weight + bias) for the heads of q and k. Contains the barrier between
// filling the rotations and using them.
template <int N>
__device__ __forceinline__ void norm_rotate(Float8 (&x)[N], const NormParameters& parameters,
                                            const NormShape& shape, const RowPlace& at,
                                            const NormShared& shared) {
  float rstd[N];
  normalise(x, rstd, shape, at, shared);
  const PieceRotation rotation = load_rotation(shared.rotations, shape.layout, at);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    scale_piece(x[n], parameters, shape, at, n);
    rotate_piece(x[n], rotation);
  }
}

// Loads the pieces of a token's heads; zeros in place of q or k if these are not wanted. As Bits8,
// or as Float8 in kernels that go over several tokens and are short of registers.
template <class T, int N>
__device__ __forceinline__ void load_heads(T (&x)[N], const HeadsView& q, const HeadsView& k,
                                           const Token& token, bool want_q, bool want_k,
                                           const NormShape& shape, const RowPlace& at) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int head = at.head + n * shape.layout.step;
    const bool of_q = head < shape.H;
    const HeadsView from = select(of_q, q, k);
    const int64_t start = from.at(token.b, token.l, of_q ? head : head - shape.H);
    const int count = (of_q ? want_q : want_k) ? channels(shape, at, n) : 0;
    load8(from.values, start + 8 * at.piece, count, x[n]);
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
    const int head = at.head + n * shape.layout.step;
    const bool of_q = head < shape.H;
    const HeadsView to = select(of_q, q, k);
    const int64_t start = to.at(token.b, token.l, of_q ? head : head - shape.H);
    store8(to.values, start + 8 * at.piece, channels(shape, at, n), x[n]);
  }
}

}  // namespace lumina_kernels::cuda
