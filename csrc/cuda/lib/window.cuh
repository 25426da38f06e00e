// Shared by the kernels that average over windows of the token grid. A block handles one window.
#pragma once

#include "cuda/lib/rope.cuh"

namespace lumina_kernels::cuda {

// factor x factor windows of (grid_h, grid_w), `rows` x `columns` of them in each of T frames, and
// the mask of valid tokens: (B, L) bytes, null if all are.
struct MaskedWindows {
  int T, grid_h, grid_w, factor, rows, columns;
  Global<const unsigned char> mask;
  int64_t mask_b, mask_l;

  __device__ __forceinline__ bool keeps(int64_t b, int64_t l) const {
    return mask == nullptr || load_global<unsigned char>(mask + b * mask_b + l * mask_l) != 0;
  }
};

// The window of a block: its sample, its index within the sample, its first token and its sides.
struct Window {
  int64_t b, number, first;
  int height, width;
};

__device__ __forceinline__ Window window_at(const MaskedWindows& windows, unsigned number) {
  const unsigned line = number / windows.columns, frame = line / windows.rows;
  const unsigned b = frame / windows.T;
  const int left = static_cast<int>(number - line * windows.columns) * windows.factor;
  const int top = static_cast<int>(line - frame * windows.rows) * windows.factor;
  const int64_t first =
      (static_cast<int64_t>(frame - b * windows.T) * windows.grid_h + top) * windows.grid_w + left;
  return {b, number - static_cast<int64_t>(b) * windows.T * windows.rows * windows.columns, first,
          min(windows.factor, windows.grid_h - top), min(windows.factor, windows.grid_w - left)};
}

// The index of the window that contains token l of a sample.
__device__ __forceinline__ int64_t window_of(const MaskedWindows& windows, int64_t l) {
  const unsigned at = static_cast<unsigned>(l), line = at / windows.grid_w;
  const unsigned frame = line / windows.grid_h;
  const unsigned row = (line - frame * windows.grid_h) / windows.factor;
  const unsigned column = (at - line * windows.grid_w) / windows.factor;
  return (static_cast<int64_t>(frame) * windows.rows + row) * windows.columns + column;
}

// The weight of a token in the mean of a window with `count` valid ones.
__device__ __forceinline__ float share_of(float count) { return 1.0f / fmaxf(count, 1.0f); }

// Writes whether a window has valid tokens, and how many.
__device__ __forceinline__ void store_count(Global<unsigned char> mask, Global<float> counts,
                                            const MaskedWindows& windows, const Window& window) {
  int count = 0;
  for (int i = 0; i < window.height; ++i) {
    for (int j = 0; j < window.width; ++j) {
      count += windows.keeps(window.b, window.first + static_cast<int64_t>(i) * windows.grid_w + j);
    }
  }
  mask[blockIdx.x] = count > 0;
  counts[blockIdx.x] = static_cast<float>(count);
}

constexpr int kWindowTokens = 4;  // whose loads do not wait for each other

// The mean over a window's valid tokens of the 8 channels from `column` on of a head of x. The
// loads of several tokens are under way at a time.
__device__ __forceinline__ Float8 window_mean(const HeadsView& x, int head, int column, int count,
                                              const MaskedWindows& windows, const Window& window) {
  const int all = window.height * window.width;
  int tokens = 0, row = 0, place = 0;
  Float8 sum{};
  for (int first = 0; first < all; first += kWindowTokens) {
    Bits8 bits[kWindowTokens];
    bool keep[kWindowTokens];
#pragma unroll
    for (int i = 0; i < kWindowTokens; ++i) {
      const int64_t l = window.first + static_cast<int64_t>(row) * windows.grid_w + place;
      keep[i] = first + i < all && windows.keeps(window.b, l);
      bits[i] = load_bits8(x.values, x.at(window.b, keep[i] ? l : window.first, head) + column,
                           keep[i] ? count : 0);
      if (++place == window.width) place = 0, ++row;
    }
#pragma unroll
    for (int i = 0; i < kWindowTokens; ++i) {
      if (!keep[i]) continue;
      sum += to_float8(bits[i], x.values.dtype);
      ++tokens;
    }
  }
  return sum * share_of(static_cast<float>(tokens));
}

}  // namespace lumina_kernels::cuda
