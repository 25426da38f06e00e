// Windows of factor x factor tokens in a (T, H, W) grid, and masks of tokens. Included before
// levels.h, as rope.h is.
#include "cpu/lib/rope_table.h"

#ifndef LUMINA_WINDOW
#define LUMINA_WINDOW
namespace lumina_kernels::cpu {

// True for valid tokens; without a mask all of them are.
struct Mask {
  const bool* data = nullptr;
  int64_t b = 0, l = 0;

  explicit Mask(const OptionalTensor& mask) {
    if (!mask) return;
    data = static_cast<const bool*>(mask->data_ptr());
    b = mask->stride(0), l = mask->stride(1);
  }

  bool operator()(int64_t i, int64_t j) const { return data == nullptr || data[i * b + j * l]; }
};

struct Windows {
  int64_t T, H, W, factor;
  int64_t rows, columns;  // of windows; those at the far edges may be smaller

  Windows(const std::vector<int64_t>& grid, int64_t factor_)
      : T(grid[0]), H(grid[1]), W(grid[2]), factor(factor_) {
    // (H + factor - 1) would overflow for a factor that means "all".
    rows = H / factor + (H % factor != 0);
    columns = W / factor + (W % factor != 0);
  }

  int64_t tokens() const { return T * H * W; }
  int64_t count() const { return T * rows * columns; }

  // The window of a token of a sample.
  int64_t of(int64_t token) const {
    const int64_t line = token / W;
    return (line / H * rows + line % H / factor) * columns + token % W / factor;
  }

  // Calls f(l) for the tokens of a window, row by row.
  template <class F>
  void for_tokens(int64_t window, const F& f) const {
    const int64_t line = window / columns, left = window % columns * factor;
    const int64_t top = line % rows * factor, height = std::min(factor, H - top);
    const int64_t first = (line / rows * H + top) * W + left, width = std::min(factor, W - left);
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) f(first + i * W + j);
  }

  // The most values in a window, with `width` of them in a token.
  int64_t work(int64_t width) const { return std::min(factor, H) * std::min(factor, W) * width; }
};

// The valid tokens of a window, in memory that this thread's next call reuses.
inline const std::vector<int64_t>& valid_tokens(const Windows& windows, const Mask& mask, int64_t b,
                                                int64_t window) {
  thread_local std::vector<int64_t> tokens;
  tokens.clear();
  windows.for_tokens(window, [&](int64_t l) {
    if (mask(b, l)) tokens.push_back(l);
  });
  return tokens;
}

// The gradient of x, (B, L, G, K), from the gradient of its means over windows.
Tensor window_mean_bwd(const Tensor& dout, const Tensor& counts, const Windows& windows,
                       const Mask& mask);

}  // namespace lumina_kernels::cpu
#endif  // LUMINA_WINDOW

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {

// The mean over `tokens` of sample b, for all heads; 0 if there are none. Token by token, although
// that takes sums in memory: processors fetch ahead along one row better than along several.
LUMINA_INLINE void window_mean(const Rows& x, int64_t b, const std::vector<int64_t>& tokens,
                               int64_t G, int64_t K, Row out) {
  float* sums = scratch(padded(G * K));
  for_vectors(G * K, [&](int64_t i, int64_t count) { store(sums + i, Vec{}, count); });
  with_dtype(out.dtype, [&](Dtype dtype) {
    for (int64_t l : tokens) {
      const TokenHeads heads = heads_at(x, b, l, G, K);
      for (int64_t n = 0; n < heads.count; ++n) {
        const Row from{(heads.row + n * heads.step).data, dtype};
        float* sum = sums + n * heads.length;
        for_vectors(heads.length, [&](int64_t i, int64_t count) {
          store(sum + i, load(sum + i, count) + load(from, i, count), count);
        });
      }
    }
    const Vec size = broadcast(static_cast<float>(std::max<size_t>(tokens.size(), 1)));
    for_vectors(G * K, [&](int64_t i, int64_t count) {
      store(Row{out.data, dtype}, i, load(sums + i, count) / size, count);
    });
  });
}

}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif  // LUMINA_LEVEL
