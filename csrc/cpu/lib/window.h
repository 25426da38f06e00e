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

  // The most tokens in a column of a window.
  int64_t height() const { return std::min(factor, H); }

  // From the tokens of a window to those of the next one in its line, 0 if there is no other whole
  // one.
  int64_t ahead(int64_t window) const { return window % columns + 1 < W / factor ? factor : 0; }

  // Calls f(l) for the tokens of a window, column by column: of windows of a line, every line of
  // tokens is then read from one end to the other, which is what processors fetch ahead.
  template <class F>
  void for_tokens(int64_t window, const F& f) const {
    const int64_t line = window / columns, left = window % columns * factor;
    const int64_t top = line % rows * factor, height = std::min(factor, H - top);
    const int64_t first = (line / rows * H + top) * W + left, width = std::min(factor, W - left);
    for (int64_t j = 0; j < width; ++j)
      for (int64_t i = 0; i < height; ++i) f(first + i * W + j);
  }

  // The most values in a window, with `width` of them in a token.
  int64_t work(int64_t width) const { return std::min(factor, H) * std::min(factor, W) * width; }
};

// Appends the valid tokens of a window; returns their number.
inline int64_t find_valid(const Windows& windows, const Mask& mask, int64_t b, int64_t window,
                          std::vector<int64_t>& tokens) {
  const size_t before = tokens.size();
  windows.for_tokens(window, [&](int64_t l) {
    if (mask(b, l)) tokens.push_back(l);
  });
  return tokens.size() - before;
}

// The gradient of x, (B, L, G, K), from the gradient of its means over windows.
Tensor window_mean_bwd(const Tensor& dout, const Tensor& counts, const Windows& windows,
                       const Mask& mask);

}  // namespace lumina_kernels::cpu
#endif  // LUMINA_WINDOW

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {

// Some of the rows that are averaged: those of the tokens [begin, end), `step` bytes apart. `sums`
// has the sum of those before, or with `first` there are none; with `last` there are none after.
struct TokenGroup {
  const char* rows;
  int64_t step;
  const int64_t *begin, *end;
  bool first, last;
  Row sums;  // float32

  // Rows are read only, but the type that loads take has no const.
  Row row(int64_t token, Dtype dtype) const {
    return {const_cast<char*>(rows) + token * step, dtype};
  }
};

// Adds kPairs pairs of vectors of the group's rows, from i on, to the sums, or the last of them,
// times or divided by `size`, to `to`.
template <int kPairs>
LUMINA_INLINE void add_group(const TokenGroup& group, Row to, Vec size, bool exact, int64_t i) {
  constexpr int64_t kStep = 2 * kWidth;
  Pair total[kPairs] = {};
  if (!group.first)
    for (int n = 0; n < kPairs; ++n) total[n] = load_pair(group.sums, i + n * kStep);
  for (const int64_t* token = group.begin; token < group.end; ++token) {
    const Row row = group.row(*token, to.dtype);
    for (int n = 0; n < kPairs; ++n) {
      const Pair x = load_pair(row, i + n * kStep);
      total[n].first += x.first, total[n].second += x.second;
    }
  }
  for (int n = 0; n < kPairs; ++n) {
    auto& [first, second] = total[n];
    if (!group.last)
      store(group.sums, i + n * kStep, total[n]);
    else if (exact)
      store(to, i + n * kStep, Pair{first * size, second * size});
    else
      store(to, i + n * kStep, Pair{first / size, second / size});
  }
}

// The same for `count` values, a vector at most.
LUMINA_INLINE void add_rest(const TokenGroup& group, Row to, Vec size, bool exact, int64_t i,
                            int64_t count) {
  Vec total = group.first ? Vec{} : load(group.sums, i, count);
  for (const int64_t* token = group.begin; token < group.end; ++token)
    total += load(group.row(*token, to.dtype), i, count);
  if (group.last)
    store(to, i, exact ? total * size : total / size, count);
  else
    store(group.sums, i, total, count);
}

// The mean over `number` tokens of sample b, for all heads; 0 if there are none. Those of a column
// of the window, `height`, are read side by side. `sums` is a buffer.
LUMINA_INLINE void window_mean(const Rows& x, int64_t b, const int64_t* tokens, int64_t number,
                               int64_t height, int64_t G, int64_t K, Row out, float* sums) {
  const TokenHeads heads = heads_at(x, b, 0, G, K);
  const float size = static_cast<float>(std::max<int64_t>(number, 1));
  const bool exact = (number & (number - 1)) == 0;  // 1 / size is; a division takes longer
  const Vec factor = broadcast(exact ? 1.f / size : size);
  // Where rows are short, sums that go through memory between the columns cost more than they win.
  const bool is_short = heads.length * size_of(out.dtype) <= 512;
  const int64_t together = is_short ? std::max<int64_t>(number, 1) : height;
  const auto mean_of_piece = [&](Dtype dtype, int64_t n) {
    const Row to{(out + n * heads.length).data, dtype};
    for (int64_t first = 0; first == 0 || first < number; first += together) {
      const int64_t end = std::min(first + together, number);
      const TokenGroup group{(heads.row + n * heads.step).data,
                             x.l * size_of(dtype),
                             tokens + first,
                             tokens + end,
                             first == 0,
                             end == number,
                             Row{reinterpret_cast<char*>(sums)}};
      int64_t i = 0;
      for (; i + 4 * kWidth <= heads.length; i += 4 * kWidth)
        add_group<2>(group, to, factor, exact, i);
      for (; i + 2 * kWidth <= heads.length; i += 2 * kWidth)
        add_group<1>(group, to, factor, exact, i);
      if (i + kWidth <= heads.length) {
        add_rest(group, to, factor, exact, i, kWidth);
        i += kWidth;
      }
      if (i < heads.length) add_rest(group, to, factor, exact, i, heads.length - i);
    }
  };
  for (int64_t n = 0; n < heads.count; ++n)
    with_dtype(out.dtype, [&](Dtype dtype) { mean_of_piece(dtype, n); });
}

}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#endif  // LUMINA_LEVEL
