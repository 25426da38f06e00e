// Kernels over rows of D values: a row belongs to blockDim.x threads, a warp or a whole block.
//
// A thread keeps kPieces pieces of 8 columns in registers, as Float8[kPieces]. A row that does not
// fit (D > 8192, kWide) takes several spans, columns [base, base + size): its loops over spans load
// again what an earlier pass has read, while those of other rows run once.
#pragma once

#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

// --- launch configuration ---

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / 32, kRowsPerBlock = 4;
constexpr int kManyPieces = 4;  // for wider rows, which get half as many threads

constexpr int row_threads(int pieces) { return pieces == 1 ? kRowThreads : kRowThreads / 2; }

// More than a block holds in registers.
inline bool row_is_wide(int64_t D) { return D > 8 * kManyPieces * row_threads(kManyPieces); }

inline int row_pieces(int64_t D) {
  return D <= 8 * kRowThreads || row_is_wide(D) ? 1 : kManyPieces;
}

// Threads of a row, and rows of a block: one warp takes a row of up to 256 columns.
inline dim3 row_block(int64_t D) {
  if (D <= 256) return dim3(32, kRowsPerBlock);
  const int64_t warps = ceil_div(D, 8 * 32 * row_pieces(D));
  return dim3(static_cast<unsigned>(32 * (warps < kRowWarps ? warps : kRowWarps)));
}

// For `count` rows, or chunks of rows.
inline LaunchConfig row_config(int64_t count, int64_t D) {
  const dim3 block = row_block(D);
  return {dim3(static_cast<unsigned>(ceil_div(count, block.y))), block};
}

// --- in a kernel ---

// The number of this thread's row, or chunk of rows.
__device__ __forceinline__ int64_t row_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// A loop over the columns of a row, a span at a time: for (base = 0; base < spans.end; base +=
// spans.size). It runs once where a thread's registers hold its part of the whole row.
struct Spans {
  int end, size;
};

template <int kPieces, bool kWide>
__device__ __forceinline__ Spans column_spans(int D) {
  return kWide ? Spans{D, 8 * kPieces * static_cast<int>(blockDim.x)} : Spans{1, 1};
}

// First column of a piece in the span at `base`.
__device__ __forceinline__ int column_of(int base, int piece) {
  const int thread = opaque(static_cast<int>(threadIdx.x));
  return base + 8 * (piece * static_cast<int>(blockDim.x) + thread);
}

// f(j) for every piece. Unrolled: only a constant index keeps an array in registers.
template <int kPieces, class F>
__device__ __forceinline__ void for_pieces(F f) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) f(j);
}

// This thread's columns of the span at `base`, in a row that starts at element `first`.
template <int kPieces>
__device__ __forceinline__ void load_span(const Values& x, int64_t first, int base, int D,
                                          Float8 (&out)[kPieces]) {
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    out[j] = load8(x, first + column, D - column);
  });
}

template <int kPieces>
__device__ __forceinline__ void store_span(const Values& x, int64_t first, int base, int D,
                                           const Float8 (&in)[kPieces]) {
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    store8(x, first + column, D - column, in[j]);
  });
}

// Sums over the threads of a row; every one of them gets the result. Consecutive sums alternate
// between two sets of slots, so that one barrier each is enough.
class RowSum {
 public:
  __device__ __forceinline__ float operator()(float x) { return both(x, 0.0f, false).x; }

  __device__ __forceinline__ float2 both(float x, float y, bool with_y = true) {
    LUMINA_SHARED(float, slots, 4 * kRowWarps);
    x = warp_sum(x);
    if (with_y) y = warp_sum(y);
    if (blockDim.x == 32) return make_float2(x, y);
    const Shared<float> first = slots + set_ * 2 * kRowWarps, second = first + kRowWarps;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int warps = static_cast<int>(blockDim.x) / 32, unused = warps + lane;
    if (lane == 0) {
      first[warp] = x;
      if (with_y) second[warp] = y;
    }
    if (warp == 0 && unused < kRowWarps) {
      first[unused] = 0.0f;
      if (with_y) second[unused] = 0.0f;
    }
    __syncthreads();
    x = total(first);
    if (with_y) y = total(second);
    set_ ^= 1;
    return make_float2(x, y);
  }

 private:
  // All slots, whatever the number of warps: a loop over these takes twice as many instructions.
  __device__ __forceinline__ static float total(Shared<float> sums) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowWarps; i += 4) {
      const float4 four = load_shared<float4>(sums + i);
      total += four.x, total += four.y, total += four.z, total += four.w;
    }
    return total;
  }

  int set_ = 0;
};

// mean (0 unless `layer`) and 1 / sqrt(mean square + eps) of a row. load(base, x) gives this
// thread's part of a span, zeros beyond D; a row of one span is left in x.
template <bool kWide, int kPieces, class Load>
__device__ __forceinline__ float2 norm_statistics(Load load, int D, float eps, bool layer,
                                                  RowSum& sum, Float8 (&x)[kPieces]) {
  const Spans spans = column_spans<kPieces, kWide>(D);
  float total = 0.0f, squares = 0.0f;
  if (layer || !kWide) {
    for (int base = 0; base < spans.end; base += spans.size) {
      load(base, x);
      for_pieces<kPieces>([&](int j) { add_columns(total, x[j]); });
    }
  }
  const float mean = layer ? sum(total) / static_cast<float>(D) : 0.0f;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) load(base, x);
    for_pieces<kPieces>([&](int j) {
      const int count = D - column_of(base, j);
      Float8 away = x[j] - mean;
      if (count < 8) away = by_column([&](int k) { return k < count ? away[k] : 0.0f; });
      add_products(squares, away, away);
    });
  }
  return make_float2(mean, rsqrtf(sum(squares) / static_cast<float>(D) + eps));
}

}  // namespace lumina_kernels::cuda
