// CPU kernels of context_drop: a window's tokens are added up in registers, line by line.
#define LUMINA_FILE "cpu/context_drop.cpp"
#include "cpu/lib/window.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

constexpr int64_t kAhead = 4096;  // bytes of a line of tokens that are fetched before their turn

struct ContextDropFwd {
  Windows windows;
  Mask mask;
  Rows k, v, k_out, v_out;
  bool* mask_out;
  float* counts;
  int64_t G, K;
};

struct WindowMeanBwd {
  Windows windows;
  Mask mask;
  Rows dout, dx;
  const float* counts;
  int64_t G, K;
};

}  // namespace lumina_kernels::cpu
#endif

#include "cpu/lib/levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// The means of k and of v over the valid tokens of windows [first, end) of a line, 0 if there are
// none, and their number. First all of k, then all of v: fewer rows are read in turn.
void context_drop_fwd(const ContextDropFwd& op, int64_t b, int64_t first, int64_t end) {
  std::vector<int64_t> tokens, counts;
  tokens.reserve((end - first) * op.windows.work(1));
  counts.reserve(end - first);
  for (int64_t window = first; window < end; ++window) {
    counts.push_back(find_valid(op.windows, op.mask, b, window, tokens));
    const int64_t at = b * op.windows.count() + window;
    op.mask_out[at] = counts.back() > 0;
    op.counts[at] = static_cast<float>(counts.back());
  }
  const int64_t height = op.windows.height();
  float* sums = scratch(padded(op.G * op.K));
  for (const auto& [x, out] : {std::tie(op.k, op.k_out), std::tie(op.v, op.v_out)}) {
    const int64_t* its = tokens.data();
    const int64_t ahead = kAhead / (op.G * op.K * size_of(x.base.dtype) + 1) + 1;
    for (int64_t window = first; window < end; its += counts[window++ - first]) {
      for (int64_t n = 0; n < counts[window - first]; ++n)
        if (its[n] + ahead < op.windows.tokens())
          prefetch(heads_at(x, b, its[n] + ahead, op.G, op.K));
      if (window + 1 < end) prefetch(heads_at(out, b, window + 1, op.G, op.K));
      window_mean(x, b, its, counts[window - first], height, op.G, op.K, out(b, window), sums);
    }
  }
}

// dx = dout / count for the valid tokens of a window, 0 for the others.
void window_mean_bwd(const WindowMeanBwd& op, int64_t b, int64_t window) {
  const int64_t width = op.G * op.K;
  const Vec size = broadcast(std::max(op.counts[b * op.windows.count() + window], 1.f));
  const Row share{reinterpret_cast<char*>(scratch(padded(width))), op.dx.base.dtype};
  const TokenHeads dout = heads_at(op.dout, b, window, op.G, op.K);
  with_dtype(share.dtype, [&](Dtype dtype) {
    for (int64_t n = 0; n < dout.count; ++n) {
      const Row from{(dout.row + n * dout.step).data, dtype},
          to{(share + n * dout.length).data, dtype};
      for_vectors(dout.length, [&](int64_t i, int64_t count) {
        store(to, i, load(from, i, count) / size, count);
      });
    }
  });
  op.windows.for_tokens(window, [&](int64_t l) {
    const Row dx = op.dx(b, l);
    if (!op.mask(b, l)) return fill_zeros(dx, width);
    std::memcpy(dx.data, share.data, width * size_of(share.dtype));
  });
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {

Tensor window_mean_bwd(const Tensor& dout, const Tensor& counts, const Windows& windows,
                       const Mask& mask) {
  const int64_t B = dout.size(0), G = dout.size(2), K = dout.size(3);
  Tensor dx = empty(dout, {B, windows.tokens(), G, K}, dout.scalar_type());
  if (dx.numel() == 0) return dx;
  const Tensor sizes = torch::stable::contiguous(counts);
  const WindowMeanBwd op{.windows = windows,
                         .mask = mask,
                         .dout = rows_of(dout),
                         .dx = rows_of(dx),
                         .counts = static_cast<const float*>(sizes.data_ptr()),
                         .G = G,
                         .K = K};
  const int64_t count = windows.count();
  parallel_rows(B * count, windows.work(G * K),
                [&](int64_t n) { LUMINA_CALL(window_mean_bwd, op, n / count, n % count); });
  return dx;
}

namespace {

constexpr int64_t kPiece = 32;  // windows that a thread averages one after the other

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors context_drop_fwd(const Tensor& k, const Tensor& v, const std::vector<int64_t>& grid,
                             int64_t factor, const OptionalTensor& key_mask) {
  const Windows windows(grid, factor);
  const int64_t B = k.size(0), G = k.size(2), K = k.size(3), count = windows.count();
  Tensor k_out = empty(k, {B, count, G, K}, k.scalar_type());
  Tensor v_out = empty(v, {B, count, G, K}, v.scalar_type());
  Tensor mask = empty(k, {B, count}, ScalarType::Bool);
  Tensor counts = empty(k, {B, count}, ScalarType::Float);
  const ContextDropFwd op{.windows = windows,
                          .mask = Mask(key_mask),
                          .k = rows_of(k),
                          .v = rows_of(v),
                          .k_out = rows_of(k_out),
                          .v_out = rows_of(v_out),
                          .mask_out = static_cast<bool*>(mask.data_ptr()),
                          .counts = static_cast<float*>(counts.data_ptr()),
                          .G = G,
                          .K = K};
  const int64_t columns = windows.columns, pieces = ceil_div(columns, kPiece);
  const int64_t lines = columns == 0 ? 0 : count / columns;
  parallel_rows(B * lines * pieces, std::min(kPiece, columns) * 2 * windows.work(G * K),
                [&](int64_t n) {
                  const int64_t line = n / pieces, at = n % pieces * kPiece;
                  const int64_t first = line % lines * columns;
                  LUMINA_CALL(context_drop_fwd, op, line / lines, first + at,
                              first + std::min(at + kPiece, columns));
                });
  return {k_out, v_out, mask, counts};
}

std::tuple<Tensor, Tensor> context_drop_bwd(const Tensor& dk_out, const Tensor& dv_out,
                                            const Tensor& counts, const std::vector<int64_t>& grid,
                                            int64_t factor, const OptionalTensor& key_mask) {
  const Windows windows(grid, factor);
  const Mask mask(key_mask);
  return {window_mean_bwd(dk_out, counts, windows, mask),
          window_mean_bwd(dv_out, counts, windows, mask)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("context_drop_fwd", TORCH_BOX(&context_drop_fwd));
  m.impl("context_drop_bwd", TORCH_BOX(&context_drop_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
