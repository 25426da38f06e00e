// Backward kernels over rows: the skeleton that the norms share, and sums over rows for the
// gradients of parameters.
//
// A warp or block goes over a chunk of rows of one sample and keeps sums over them in registers;
// they become partial sums in memory, which a second stage adds up.
#pragma once

#include "cuda/lib/rows.cuh"

namespace lumina_kernels::cuda {

// B samples of L rows of D values, in chunks of `rows` rows.
struct RowChunks {
  int64_t B, L, rows;
  int D;

  __host__ __device__ __forceinline__ int64_t per_sample() const { return ceil_div(L, rows); }
  __host__ __device__ __forceinline__ int64_t count() const { return B * per_sample(); }
};

// f(rows) for the rows of chunk `number`, kRows at once.
template <int kRows, class F>
__device__ __forceinline__ void for_rows_of_chunk(const RowChunks& chunks, int64_t b,
                                                  int64_t number, F f) {
  const int64_t start = (number - b * chunks.per_sample()) * chunks.rows;
  const int64_t end = min(start + chunks.rows, chunks.L);
#pragma unroll 1
  for (int64_t l = start; l < end; l += kRows) {
    f(rows_at<kRows>(opaque(b), l, chunks.L, end));
  }
}

// --- the gradient of a norm's input ---

// Over rows: mean(d * n) and, for a LayerNorm, mean(d), where n is the norm's output and d its
// gradient.
template <int kRows>
struct NormBwdMeans {
  float dn[kRows], d[kRows];
};

// gradient(base) leaves d and n of a span in the arrays of these names, and adds to sums over rows;
// flush(base) writes these sums where a row has several spans.
template <RowKind kKind, int kPieces, int kRows, class Gradient, class Flush>
__device__ __forceinline__ NormBwdMeans<kRows> norm_bwd_means(Gradient gradient, Flush flush, int D,
                                                              bool layer, RowSums& sums,
                                                              const Float8 (&d)[kPieces][kRows],
                                                              const Float8 (&n)[kPieces][kRows]) {
  const Spans spans = column_spans<kKind>(D);
  const float share = reciprocal_approx(static_cast<float>(D));
  float totals[2 * kRows] = {};
  for (int base = 0; base < spans.end; base += spans.size) {
    gradient(base);
    for_each<kPieces>([&](int j) {
      for_each<kRows>([&](int r) { add_products(totals[r], d[j][r], n[j][r]); });
      if (!layer) return;
      for_each<kRows>([&](int r) { add_columns(totals[kRows + r], d[j][r]); });
    });
    if (kKind == RowKind::kWide) flush(base);
  }
  NormBwdMeans<kRows> means = {};
  if (layer) {
    sums(totals);
    for_each<kRows>(
        [&](int r) { means.d[r] = mean_of(totals[kRows + r], static_cast<float>(D), share); });
  } else {
    float rms[kRows];
    for_each<kRows>([&](int r) { rms[r] = totals[r]; });
    sums(rms);
    for_each<kRows>([&](int r) { totals[r] = rms[r]; });
  }
  for_each<kRows>([&](int r) { means.dn[r] = totals[r] * share; });
  return means;
}

// d becomes the gradient of the norm's input: rstd * (d - mean(d) - n * mean(d * n)).
template <int kPieces, int kRows>
__device__ __forceinline__ void norm_bwd(Float8 (&d)[kPieces][kRows],
                                         const Float8 (&n)[kPieces][kRows],
                                         const float (&rstd)[kRows],
                                         const NormBwdMeans<kRows>& means) {
  for_each<kPieces>([&](int j) {
    for_each<kRows>(
        [&](int r) { d[j][r] = rstd[r] * (d[j][r] - means.d[r] - n[j][r] * means.dn[r]); });
  });
}

// --- sums over rows: the first stage ---

template <int kPieces>
__device__ __forceinline__ void clear(Float8 (&sums)[kPieces]) {
  for_each<kPieces>([&](int j) { sums[j] = Float8{}; });
}

// Writes the sums of a span to the row of float32 numbers that starts at element `first`, or adds
// them to what is there, and begins again.
template <int kPieces>
__device__ __forceinline__ void flush_sums(const Values& partial, int64_t first, int base, int D,
                                           bool add, Float8 (&sums)[kPieces]) {
  const Values to = {partial.data, Dtype::kFloat, partial.vectors};
  for_each<kPieces>([&](int j) {
    const int column = column_of(base, j);
    if (add) sums[j] += load8(to, first + column, D - column);
    store8(to, first + column, D - column, sums[j]);
  });
  clear(sums);
}

// --- the second stage: kSumColumns columns a block, kSumSlices threads for each ---

constexpr int kSumColumns = 16, kSumSlices = 32;

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
