// Backward kernels over rows: the skeleton that the norms share, and sums over rows for the
// gradients of parameters.
//
// A warp or block goes over a chunk of rows of one sample and keeps sums over them in registers;
// they become partial sums in memory, which a second stage adds up.
#pragma once

#include "cuda/lib/rows.cuh"

namespace lumina_kernels::cuda {

// Rows in a chunk: so many that partial sums are a small part of the traffic, unless there are too
// few rows to keep a GPU busy. A row that does not fit the registers writes its sums at once.
inline int64_t row_chunk(int64_t rows, int64_t D) {
  return row_is_wide(D) ? 1 : rows >= 4096 ? 16 : 4;
}

// B samples of L rows of D values, in chunks of `rows` rows.
struct RowChunks {
  int64_t B, L, rows;
  int D;

  __device__ __forceinline__ int64_t per_sample() const { return ceil_div(L, rows); }
  __device__ __forceinline__ int64_t count() const { return B * per_sample(); }
};

// f(b, l, row) for the rows of chunk `number`: row l of sample b, number `row` of all.
template <class F>
__device__ __forceinline__ void for_rows_of_chunk(const RowChunks& chunks, int64_t number, F f) {
  const int64_t per_sample = chunks.per_sample(), sample = divide(number, per_sample);
  const int64_t start = (number - sample * per_sample) * chunks.rows;
  const int64_t end = min(start + chunks.rows, chunks.L);
#pragma unroll 1
  for (int64_t l = start; l < end; ++l) {
    const int64_t b = opaque(sample);
    f(b, l, b * chunks.L + l);
  }
}

// --- the gradient of a norm's input ---

// Over a row: mean(d * n) and, for a LayerNorm, mean(d), where n is the norm's output and d its
// gradient.
struct NormBwdMeans {
  float dn, d;
};

// gradient(base) leaves d and n of a span in the arrays of these names, and adds to sums over rows;
// flush(base) writes these sums where a row has several spans.
template <bool kWide, int kPieces, class Gradient, class Flush>
__device__ __forceinline__ NormBwdMeans norm_bwd_means(Gradient gradient, Flush flush, int D,
                                                       bool layer, RowSum& sum,
                                                       const Float8 (&d)[kPieces],
                                                       const Float8 (&n)[kPieces]) {
  const Spans spans = column_spans<kPieces, kWide>(D);
  float dn_total = 0.0f, d_total = 0.0f;
  for (int base = 0; base < spans.end; base += spans.size) {
    gradient(base);
    for_pieces<kPieces>([&](int j) {
      add_products(dn_total, d[j], n[j]);
      add_columns(d_total, d[j]);
    });
    if (kWide) flush(base);
  }
  const float2 totals = sum.both(dn_total, d_total, layer);
  return {totals.x / static_cast<float>(D), layer ? totals.y / static_cast<float>(D) : 0.0f};
}

// d becomes the gradient of the norm's input: rstd * (d - mean(d) - n * mean(d * n)).
template <int kPieces>
__device__ __forceinline__ void norm_bwd(Float8 (&d)[kPieces], const Float8 (&n)[kPieces],
                                         float rstd, const NormBwdMeans& means) {
  for_pieces<kPieces>([&](int j) { d[j] = rstd * (d[j] - means.d - n[j] * means.dn); });
}

// --- sums over rows: the first stage ---

template <int kPieces>
__device__ __forceinline__ void clear(Float8 (&sums)[kPieces]) {
  for_pieces<kPieces>([&](int j) { sums[j] = Float8{}; });
}

// Writes the sums of a span to D float32 numbers, and begins again.
template <int kPieces>
__device__ __forceinline__ void flush_sums(Global<float> to, int base, int D,
                                           Float8 (&sums)[kPieces]) {
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    const Float8& sum = sums[j];
    if (D % 4 == 0) {
      if (column + 4 <= D) {
        store_global(to + column, make_float4(sum[0], sum[1], sum[2], sum[3]));
      }
      if (column + 8 <= D) {
        store_global(to + (column + 4), make_float4(sum[4], sum[5], sum[6], sum[7]));
      }
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (column + k < D) store_global(to + (column + k), sum[k]);
      }
    }
  });
  clear(sums);
}

// --- the second stage: kSumColumns columns a block, kSumSlices threads for each ---

constexpr int kSumColumns = 32, kSumSlices = 16;

inline LaunchConfig sums_config(int64_t D) {
  return {dim3(static_cast<unsigned>(ceil_div(D, kSumColumns))), dim3(kSumColumns, kSumSlices)};
}

// Partial sums (B, chunks, sums, D), from number `first` of the `sums` on.
struct PartialSums {
  Global<const float> first;
  int64_t B, chunks;
  int sums, D;
};

// For one column: S, the sums over the chunks of each sample, and `total`, the sums over samples of
// what finish(b, S) makes of them; slice 0 alone gets the total. The order of additions depends on
// the shape alone: in a round several samples share the slices, and the chunks of a sample share
// its slices.
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
