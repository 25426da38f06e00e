// Kernels over rows of D values: a row is held by blockDim.x threads, a warp or a whole block.
//
// A thread has kPieces pieces of 8 columns, in registers as float[kPieces][8]. What does not fit
// (D > 8192, kWide) takes several spans, columns [base, base + span): there, loops over `base` load
// again what a pass before has read; elsewhere they run once.
#pragma once

#include "cuda/lib/values.cuh"

namespace lumina_kernels::cuda {

// --- launch configuration ---

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / 32, kRowsPerBlock = 4;
constexpr int kManyPieces = 4;  // of wider rows, for which there are half as many threads

constexpr int row_threads(int pieces) { return pieces == 1 ? kRowThreads : kRowThreads / 2; }

// More than a block holds in registers.
inline bool row_is_wide(int64_t D) { return D > 8 * kManyPieces * row_threads(kManyPieces); }

inline int row_pieces(int64_t D) {
  return D <= 8 * kRowThreads || row_is_wide(D) ? 1 : kManyPieces;
}

// Threads of a row, and rows of a block: a row of up to 256 columns is a warp's.
inline dim3 row_block(int64_t D) {
  if (D <= 256) return dim3(32, kRowsPerBlock);
  const int64_t warps = ceil_div(D, 8 * 32 * row_pieces(D));
  return dim3(static_cast<unsigned>(32 * (warps < kRowWarps ? warps : kRowWarps)));
}

// `count` rows, or chunks of rows.
inline LaunchConfig row_config(int64_t count, int64_t D) {
  const dim3 block = row_block(D);
  return {dim3(static_cast<unsigned>(ceil_div(count, block.y))), block};
}

// Rows that a backward adds up before it writes partial sums: so many that these are a small part
// of the traffic, unless there are too few rows to keep a GPU busy. Sums of a row that does not fit
// the registers are written at once.
inline int64_t row_chunk(int64_t rows, int64_t D) {
  return row_is_wide(D) ? 1 : rows >= 4096 ? 16 : 4;
}

// --- in a kernel ---

// Number of this thread's row, or chunk.
__device__ __forceinline__ int64_t row_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// The spans of a row: for (base = 0; base < spans.end; base += spans.size).
struct Spans {
  int end, size;
};

template <int kPieces, bool kWide>
__device__ __forceinline__ Spans row_spans(int D) {
  return kWide ? Spans{D, 8 * kPieces * static_cast<int>(blockDim.x)} : Spans{1, 1};
}

// The same number, of which the compiler does not know that. What follows from it, addresses of six
// tensors and conditions, would else be moved out of a loop over rows and take its registers.
__device__ __forceinline__ int opaque(int number) {
#ifndef LUMINA_CUDA_HOST
  asm volatile("" : "+r"(number));
#endif
  return number;
}

__device__ __forceinline__ int64_t opaque(int64_t number) {
#ifndef LUMINA_CUDA_HOST
  asm volatile("" : "+l"(number));
#endif
  return number;
}

// First column of a piece in the span at `base`.
__device__ __forceinline__ int column_of(int base, int piece) {
  const int thread = opaque(static_cast<int>(threadIdx.x));
  return base + 8 * (piece * static_cast<int>(blockDim.x) + thread);
}

// This thread's columns of the span at `base`, of a row that starts at element `first`.
template <int kPieces>
__device__ __forceinline__ void load_span(const Values& x, int64_t first, int base, int D,
                                          float (&out)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    load8(x, first + column, D - column, out[j]);
  }
}

// The same, added to `sum`.
template <int kPieces>
__device__ __forceinline__ void add_span(const Values& x, int64_t first, int base, int D,
                                         float (&sum)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    float more[8];
    load8(x, first + column, D - column, more);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[j][k] += more[k];
  }
}

template <int kPieces>
__device__ __forceinline__ void store_span(const Values& x, int64_t first, int base, int D,
                                           const float (&in)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    store8(x, first + column, D - column, in[j]);
  }
}

// f(j, k) for this thread's columns, there or not; registers are indexed by constants alone.
template <int kPieces, class F>
__device__ __forceinline__ void for_columns(F f) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
#pragma unroll
    for (int k = 0; k < 8; ++k) f(j, k);
  }
}

// Sums over the threads of a row, in each of them. Two sets of slots take turns, so that one
// barrier a sum is enough.
class RowSum {
 public:
  __device__ __forceinline__ float operator()(float x) { return both(x, 0.0f, false).x; }

  __device__ __forceinline__ float2 both(float x, float y, bool with_y = true) {
    LUMINA_SHARED(float, slots, 4 * kRowWarps);
    x = warp_sum(x);
    if (with_y) y = warp_sum(y);
    if (blockDim.x == 32) return make_float2(x, y);
    const Shared<float> first = slots + slot_ * 2 * kRowWarps, second = first + kRowWarps;
    if (threadIdx.x % 32 == 0) {
      first[threadIdx.x / 32] = x;
      if (with_y) second[threadIdx.x / 32] = y;
    }
    __syncthreads();
    x = y = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
      x += first[warp];
      if (with_y) y += second[warp];
    }
    slot_ ^= 1;
    return make_float2(x, y);
  }

 private:
  int slot_ = 0;
};

// mean (0 unless `layer`) and 1 / sqrt(mean square + eps) of a row. load(base, x) gives this
// thread's part of a span, zeros beyond D; x is left with the row where that is one span.
template <bool kWide, int kPieces, class Load>
__device__ __forceinline__ float2 norm_statistics(Load load, int D, float eps, bool layer,
                                                  RowSum& sum, float (&x)[kPieces][8]) {
  const Spans spans = row_spans<kPieces, kWide>(D);
  float total = 0.0f, squares = 0.0f;
  if (layer || !kWide) {
    for (int base = 0; base < spans.end; base += spans.size) {
      load(base, x);
      for_columns<kPieces>([&](int j, int k) { total += x[j][k]; });
    }
  }
  const float mean = layer ? sum(total) / static_cast<float>(D) : 0.0f;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) load(base, x);
    for_columns<kPieces>([&](int j, int k) {
      const float away = column_of(base, j) + k < D ? x[j][k] - mean : 0.0f;
      squares += away * away;
    });
  }
  return make_float2(mean, rsqrtf(sum(squares) / static_cast<float>(D) + eps));
}

// Gradient of a norm's input from that of its output, d, in place:
// rstd * (d - mean(d) - n * mean(d * n)), with both means given.
template <int kPieces>
__device__ __forceinline__ void norm_bwd(float (&d)[kPieces][8], const float (&n)[kPieces][8],
                                         float rstd, float along, float mean) {
  for_columns<kPieces>([&](int j, int k) { d[j][k] = rstd * (d[j][k] - mean - n[j][k] * along); });
}

// --- sums over rows, for the gradients of parameters ---

template <int kPieces>
__device__ __forceinline__ void clear(float (&sums)[kPieces][8]) {
  for_columns<kPieces>([&](int j, int k) { sums[j][k] = 0.0f; });
}

// Partial sums of a chunk to D float32 numbers.
template <int kPieces>
__device__ __forceinline__ void store_sums(Global<float> to, int base, int D,
                                           const float (&sums)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    if (D % 4 == 0) {
      if (column + 4 <= D) {
        store_global(to + column, make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]));
      }
      if (column + 8 <= D) {
        store_global(to + (column + 4),
                     make_float4(sums[j][4], sums[j][5], sums[j][6], sums[j][7]));
      }
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (column + k < D) store_global(to + (column + k), sums[j][k]);
      }
    }
  }
}

// The second stage: kSumColumns columns a block, kSumSlices threads for each.
constexpr int kSumColumns = 32, kSumSlices = 16;

inline LaunchConfig sums_config(int64_t D) {
  return {dim3(static_cast<unsigned>(ceil_div(D, kSumColumns))), dim3(kSumColumns, kSumSlices)};
}

// Partial sums (B, chunks, sums, D), of which kSums are used: those that start at `first`.
struct PartialSums {
  Global<const float> first;
  int64_t B, chunks;
  int sums, D;
};

// Of a column: the sums S over the chunks of each sample, finish(b, S), which turns S into what the
// sample adds to `total`, and that over all samples, which only slice 0 gets. In an order that
// depends on the shape alone: the samples of a round share the slices, and so do a sample's chunks.
template <int kSums, class Finish>
__device__ __forceinline__ void sum_partials(const PartialSums& p, int column, Finish finish,
                                             float (&total)[kSums]) {
  LUMINA_SHARED(float, slots, kSums * kSumSlices * kSumColumns);
  const int slice = threadIdx.y, lane = threadIdx.x;
  int per_sample = kSumSlices;  // slices of a sample
  while (per_sample > 1 && kSumSlices / per_sample < p.B) per_sample /= 2;
  const int samples = kSumSlices / per_sample, sub = slice % per_sample;
  for (int i = 0; i < kSums; ++i) total[i] = 0.0f;
  for (int64_t start = 0; start < p.B; start += samples) {
    const int64_t b = start + slice / per_sample;
    float S[kSums] = {};
    if (b < p.B && column < p.D) {
      for (int64_t c = sub; c < p.chunks; c += per_sample) {
        const int64_t row = (b * p.chunks + c) * p.sums;
        for (int i = 0; i < kSums; ++i) {
          S[i] += load_global<float>(p.first + ((row + i) * p.D + column));
        }
      }
    }
    for (int i = 0; i < kSums; ++i) slots[(i * kSumSlices + slice) * kSumColumns + lane] = S[i];
    __syncthreads();
    if (sub == 0 && b < p.B && column < p.D) {
      for (int i = 0; i < kSums; ++i) {
        for (int other = 1; other < per_sample; ++other) {
          S[i] += slots[(i * kSumSlices + slice + other) * kSumColumns + lane];
        }
      }
      finish(b, S);
      for (int i = 0; i < kSums; ++i) total[i] += S[i];
    }
    __syncthreads();
  }
  for (int i = 0; i < kSums; ++i) slots[(i * kSumSlices + slice) * kSumColumns + lane] = total[i];
  __syncthreads();
  for (int i = 0; slice == 0 && i < kSums; ++i) {
    for (int other = 1; other < kSumSlices; ++other) {
      total[i] += slots[(i * kSumSlices + other) * kSumColumns + lane];
    }
  }
}

}  // namespace lumina_kernels::cuda
