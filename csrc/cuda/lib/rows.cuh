// Kernels over rows of D values: a row belongs to blockDim.x threads, a warp or a whole block.
//
// A thread keeps its columns of kRows rows in registers, as Float8[kPieces][kRows]: kPieces pieces
// of 8 neighbouring columns. There are three kinds of rows, each with its own kernel:
//   - plain: D <= 4096, all tensors of one 16-bit dtype and aligned, one modulation a sample. Two
//     or four rows at once (one or two in a backward) share what a thread does for them all:
//     parameters that it loads and converts, the tanh of a gate, addresses, branches, barriers;
//   - whole: whatever else fits the registers, D <= 6144;
//   - wide: several spans, columns [base, base + size). Loops over spans load again what an earlier
//     pass has read, while those of other rows run once.
#pragma once

#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

// --- launch configuration ---

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / 32, kRowsPerBlock = 4;
constexpr int kWholeThreads = 384;  // of whole rows, whose backward needs more registers

enum class RowKind { kPlain, kWhole, kWide };

template <RowKind kKind>
constexpr bool kPlain = kKind == RowKind::kPlain;
template <RowKind kKind>
constexpr int kPieces = kKind == RowKind::kWhole ? 2 : 1;

// Bounds that ptxas takes for a limit of registers: in plain rows 80 in a forward, so that 24 warps
// are on a processor, and 96 in a backward, for 20. Wide rows have blocks of 512 threads, and some
// kernels a bound of 64 more: ptxas would else spill a few registers to have two on a processor.
template <RowKind kKind>
constexpr int kForwardBounds = kPlain<kKind>              ? 768
                               : kKind == RowKind::kWhole ? kWholeThreads
                                                          : kRowThreads;
template <RowKind kKind>
constexpr int kBackwardBounds = kPlain<kKind>              ? 640
                                : kKind == RowKind::kWhole ? kWholeThreads
                                                           : kRowThreads + 64;

// Threads of a row, and rows (or groups, or chunks of rows) of a block: one warp takes a narrow
// row.
inline dim3 row_block(int64_t D, int pieces) {
  if (D <= 256) return dim3(32, kRowsPerBlock);
  const int64_t warps = ceil_div(D, 8 * 32 * pieces);
  return dim3(static_cast<unsigned>(32 * (warps < kRowWarps ? warps : kRowWarps)));
}

// For `count` groups or chunks of rows.
inline LaunchConfig row_config(int64_t count, int64_t D, int pieces) {
  const dim3 block = row_block(D, pieces);
  return {dim3(static_cast<unsigned>(ceil_div(count, block.y))), block};
}

// --- in a kernel ---

// The number of this thread's group or chunk of rows.
__device__ __forceinline__ int64_t row_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// Rows l, l + 1, ... of sample b, that is, number `row`, row + 1, ... of all. After row l + last
// they repeat it: what is computed and stored twice is the same.
struct RowGroup {
  int64_t b, l, row;
  int last;

  __device__ __forceinline__ int64_t of(const RowsView& x, int r) const {
    return x.row(b, l) + after(r) * static_cast<int>(x.step_l);
  }
  // In a tensor without gaps.
  __device__ __forceinline__ int64_t of(int D, int r) const { return row * D + after(r) * D; }
  __device__ __forceinline__ int64_t number(int r) const { return row + after(r); }

 private:
  // Steps are below 2^31 where there are several rows.
  __device__ __forceinline__ int64_t after(int r) const { return r == 0 ? 0 : min(r, last); }
};

// kRows rows of L from l on, up to `end`.
template <int kRows>
__device__ __forceinline__ RowGroup rows_at(int64_t b, int64_t l, int64_t L, int64_t end) {
  const int64_t left = end - 1 - l;
  return {b, l, b * L + l, left < kRows ? static_cast<int>(left) : kRows - 1};
}

// A loop over the columns of a row, a span at a time: for (base = 0; base < spans.end; base +=
// spans.size). It runs once where a thread's registers hold its part of the whole row.
struct Spans {
  int end, size;
};

template <RowKind kKind>
__device__ __forceinline__ Spans column_spans(int D) {
  return kKind == RowKind::kWide ? Spans{D, 8 * static_cast<int>(blockDim.x)} : Spans{1, 1};
}

// First column of a piece in the span at `base`.
__device__ __forceinline__ int column_of(int base, int piece) {
  const int thread = opaque(static_cast<int>(threadIdx.x));
  return base + 8 * (piece * static_cast<int>(blockDim.x) + thread);
}

// f(i) for every piece, or every row. Unrolled: only a constant index keeps an array in registers.
template <int kCount, class F>
__device__ __forceinline__ void for_each(F f) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) f(i);
}

// --- 8 columns of kRows rows ---

// Plain rows are loaded before anything is converted, since a conversion waits for its load, and
// with it what follows in the code. Others are loaded where they are used, which takes fewer
// registers.
template <RowKind kKind>
__device__ __forceinline__ uint4 load_ahead(const Values& x, int64_t i, int count) {
  return kPlain<kKind> && count > 0 ? load_global<uint4>(x.data + 2 * i) : uint4{};
}

template <RowKind kKind, int kRows>
__device__ __forceinline__ void load_ahead(const RowsView& x, const RowGroup& rows, int column,
                                           int D, uint4 (&ahead)[kRows]) {
  for_each<kRows>(
      [&](int r) { ahead[r] = load_ahead<kKind>(x.values, rows.of(x, r) + column, D - column); });
}

// f(r, x) with the numbers of every row.
template <RowKind kKind, int kRows, class F>
__device__ __forceinline__ void with_rows(const RowsView& x, const uint4 (&ahead)[kRows],
                                          const RowGroup& rows, int column, int D, F f) {
  for_each<kPlain<kKind> ? 0 : kRows>(
      [&](int r) { f(r, load8(x.values, rows.of(x, r) + column, D - column)); });
  if (!kPlain<kKind>) return;
  const auto unpack = [&](Dtype dtype) {  // a branch for all rows
    for_each<kRows>([&](int r) { f(r, unpack8(ahead[r], dtype)); });
  };
  if (x.values.dtype == Dtype::kBFloat16) return unpack(Dtype::kBFloat16);
  unpack(Dtype::kHalf);
}

// To rows without gaps.
template <RowKind kKind, int kRows>
__device__ __forceinline__ void store_rows(const Values& x, const RowGroup& rows, int column, int D,
                                           const Float8 (&in)[kRows]) {
  if constexpr (kPlain<kKind>) {
    if (column >= D) return;
    const auto store = [&](Dtype dtype) {
      for_each<kRows>(
          [&](int r) { store_global(x.data + 2 * (rows.of(D, r) + column), pack8(in[r], dtype)); });
    };
    if (x.dtype == Dtype::kBFloat16) return store(Dtype::kBFloat16);
    store(Dtype::kHalf);
  } else {
    for_each<kRows>([&](int r) { store8(x, rows.of(D, r) + column, D - column, in[r]); });
  }
}

template <RowKind kKind, int kPieces, int kRows>
__device__ __forceinline__ void store_span(const Values& x, const RowGroup& rows, int base, int D,
                                           const Float8 (&in)[kPieces][kRows]) {
  for_each<kPieces>([&](int j) { store_rows<kKind>(x, rows, column_of(base, j), D, in[j]); });
}

// --- sums over a row ---

// kCount sums, a power of two, over the threads of a row; every one of them gets the results. The
// lanes of a warp share the sums: a lane adds up warps of sum lane / (32 / kCount) alone.
// Consecutive calls alternate between two sets of slots, so that one barrier each is enough.
class RowSums {
 public:
  template <int kCount>
  __device__ __forceinline__ void operator()(float (&x)[kCount]) {
    constexpr int kLanes = 32 / kCount;  // of a sum
    LUMINA_SHARED(float, slots, 2 * kRowWarps * kCount);
    const int lane = static_cast<int>(threadIdx.x) % 32, mine = lane / kLanes;
    float sum = warp_sums(x, lane);
    if (blockDim.x > 32) {
      const int warps = static_cast<int>(blockDim.x) / 32, first = lane % kLanes;
      const Shared<float> set = slots + (set_ * kRowWarps * kCount + mine);
      if (first == 0) set[threadIdx.x / 32 * kCount] = sum;
      __syncthreads();
      sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kRowWarps; warp += kLanes) {
        if (first + warp < warps) sum += set[(first + warp) * kCount];
      }
#pragma unroll
      for (int bits = kLanes < kRowWarps ? kLanes / 2 : kRowWarps / 2; bits > 0; bits /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, bits);
      }
      set_ ^= 1;
    }
    for_each<kCount>([&](int i) { x[i] = __shfl_sync(kAllLanes, sum, i * kLanes); });
  }

 private:
  int set_ = 0;
};

// x - mean, and 0 beyond the row.
template <int kPieces, int kRows>
__device__ __forceinline__ void subtract(const float (&mean)[kRows], int base, int D,
                                         Float8 (&x)[kPieces][kRows]) {
  for_each<kPieces>([&](int j) {
    const int count = D - column_of(base, j);
    for_each<kRows>([&](int r) { x[j][r] = x[j][r] - mean[r]; });
    if (count >= 8) return;
    for_each<kRows>(
        [&](int r) { x[j][r] = by_column([&](int k) { return k < count ? x[j][r][k] : 0.0f; }); });
  });
}

// sum / D, with 1 / D or its neighbour at hand, rounded once: a row of equal values then has these
// as its mean, and nothing is left of it where it is subtracted.
__device__ __forceinline__ float mean_of(float sum, float D, float reciprocal) {
  const float share = sum * reciprocal;
  return fmaf(fmaf(-share, D, sum), reciprocal, share);
}

// Means (0 unless `layer`) and 1 / sqrt(mean square + eps) of rows. load(base, x) gives this
// thread's part of a span, zeros beyond D; rows of one span are left in x, without their means.
template <RowKind kKind, int kPieces, int kRows, class Load>
__device__ __forceinline__ void norm_statistics(Load load, int D, float eps, bool layer,
                                                RowSums& sums, Float8 (&x)[kPieces][kRows],
                                                float (&mean)[kRows], float (&rstd)[kRows]) {
  constexpr bool kWide = kKind == RowKind::kWide;
  const Spans spans = column_spans<kKind>(D);
  const float share = reciprocal_approx(static_cast<float>(D));
  for_each<kRows>([&](int r) { mean[r] = rstd[r] = 0.0f; });
  if (!kWide) load(0, x);
  if (layer) {
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) load(base, x);
      for_each<kPieces>(
          [&](int j) { for_each<kRows>([&](int r) { add_columns(mean[r], x[j][r]); }); });
    }
    sums(mean);
    for_each<kRows>([&](int r) { mean[r] = mean_of(mean[r], static_cast<float>(D), share); });
  }
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) load(base, x);
    if (layer) subtract(mean, base, D, x);
    for_each<kPieces>(
        [&](int j) { for_each<kRows>([&](int r) { add_products(rstd[r], x[j][r], x[j][r]); }); });
  }
  sums(rstd);
  for_each<kRows>([&](int r) { rstd[r] = rsqrtf(rstd[r] * share + eps); });
}

}  // namespace lumina_kernels::cuda
