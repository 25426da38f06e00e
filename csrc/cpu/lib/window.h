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

  // From the tokens of a window to those of the next one in its line, 0 if there is no other whole
  // one.
  int64_t ahead(int64_t window) const { return window % columns + 1 < W / factor ? factor : 0; }

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

// The valid tokens of a window, in place of what `tokens` held.
inline void find_valid(const Windows& windows, const Mask& mask, int64_t b, int64_t window,
                       std::vector<int64_t>& tokens) {
  tokens.clear();
  windows.for_tokens(window, [&](int64_t l) {
    if (mask(b, l)) tokens.push_back(l);
  });
}

// The gradient of x, (B, L, G, K), from the gradient of its means over windows.
Tensor window_mean_bwd(const Tensor& dout, const Tensor& counts, const Windows& windows,
                       const Mask& mask);

}  // namespace lumina_kernels::cpu
#endif  // LUMINA_WINDOW

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {

// out[i] = the mean of rows[n][i] over n, for the vectors of [0, length); 0 without rows. Four
// vectors at a time are added up in registers.
LUMINA_INLINE void mean_of(const std::vector<Row>& rows, Dtype dtype, Row out, int64_t length) {
  const int64_t number = std::max<int64_t>(rows.size(), 1);
  const Vec size = broadcast(static_cast<float>(number)), share = 1.f / size;
  const bool exact = (number & (number - 1)) == 0;  // a division takes longer
  const Row to{out.data, dtype};
  int64_t i = 0;
  for (; i + 4 * kWidth <= length; i += 4 * kWidth) {
    Vec sums[4] = {};
    for (const Row& row : rows)
      for (int n = 0; n < 4; ++n) sums[n] += load(Row{row.data, dtype}, i + n * kWidth);
    for (Vec& sum : sums) sum = exact ? sum * share : sum / size;
    for (int n = 0; n < 4; ++n) store(to, i + n * kWidth, sums[n]);
  }
  for (; i < length; i += kWidth) {
    const int64_t count = std::min(kWidth, length - i);
    Vec sum{};
    for (const Row& row : rows) sum += load(Row{row.data, dtype}, i, count);
    store(to, i, sum / size, count);
  }
}

// The mean over `tokens` of sample b, for all heads; 0 if there are none. Meanwhile the tokens that
// are `ahead` further on are fetched, unless it is 0: processors do so by themselves along one row,
// but not along several at once. `rows` is a buffer.
LUMINA_INLINE void window_mean(const Rows& x, int64_t b, const std::vector<int64_t>& tokens,
                               int64_t ahead, int64_t G, int64_t K, Row out,
                               std::vector<Row>& rows) {
  const TokenHeads heads = heads_at(x, b, 0, G, K);
  if (ahead > 0)
    for (int64_t l : tokens) prefetch(heads_at(x, b, l + ahead, G, K));
  for (int64_t n = 0; n < heads.count; ++n) {
    rows.clear();
    for (int64_t l : tokens) rows.push_back(x(b, l) + n * heads.step);
    with_dtype(out.dtype,
               [&](Dtype dtype) { mean_of(rows, dtype, out + n * heads.length, heads.length); });
  }
}

}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif  // LUMINA_LEVEL
