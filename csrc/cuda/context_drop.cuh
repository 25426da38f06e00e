// CUDA kernels of context_drop: a block handles one window, with all heads of k and v.
#pragma once

#include "cuda/lib/window.cuh"

namespace lumina_kernels::cuda {

constexpr int kContextDropThreads = 256;

struct ContextDropFwdParams {
  HeadsView k, v, k_out, v_out;
  Global<unsigned char> mask_out;  // (B, L') bool
  Global<float> counts;            // (B, L')
  MaskedWindows windows;
  int G, K;
};

// For two tensors, or for the second alone: then `tensors` is 1, and dk_out and dk are null.
struct ContextDropBwdParams {
  HeadsView dk_out, dv_out, dk, dv;
  Global<const float> counts;
  int64_t counts_b;
  MaskedWindows windows;
  int tensors, G, K;
};

// A thread takes 8 channels of a head, and further ones if a window has more than the block.
inline LaunchConfig context_drop_config(int64_t windows, int64_t heads, int64_t K) {
  const int64_t threads = 32 * ceil_div(std::max<int64_t>(heads * ceil_div(K, 8), 1), 32);
  return {dim3(static_cast<unsigned>(windows)),
          dim3(static_cast<unsigned>(std::min<int64_t>(threads, kContextDropThreads)))};
}

// The means of k and of v over the valid tokens of a window, 0 if there are none, and their number.
__global__ void __launch_bounds__(kContextDropThreads)
    context_drop_kernel(const ContextDropFwdParams p) {
  const Window window = window_at(p.windows, blockIdx.x);
  const int pieces = static_cast<int>(ceil_div(p.K, 8));
  for (int i = static_cast<int>(threadIdx.x); i < 2 * p.G * pieces; i += blockDim.x) {
    const int row = i / pieces, column = 8 * (i - row * pieces);
    const bool of_k = row < p.G;
    const int head = of_k ? row : row - p.G, count = p.K - column;
    const Float8 mean = window_mean(select(of_k, p.k, p.v), head, column, count, p.windows, window);
    const HeadsView to = select(of_k, p.k_out, p.v_out);
    store8(to.values, to.at(window.b, window.number, head) + column, count, mean);
  }
  if (threadIdx.x == 0) store_count(p.mask_out, p.counts, p.windows, window);
}

// dk = dk_out / count and dv = dv_out / count for the valid tokens of a window, 0 for the others.
__global__ void __launch_bounds__(kContextDropThreads)
    context_drop_bwd_kernel(const ContextDropBwdParams p) {
  const Window window = window_at(p.windows, blockIdx.x);
  const float share =
      share_of(load_global<float>(p.counts + window.b * p.counts_b + window.number));
  const int pieces = static_cast<int>(ceil_div(p.K, 8));
  for (int i = static_cast<int>(threadIdx.x); i < p.tensors * p.G * pieces; i += blockDim.x) {
    const int row = i / pieces, column = 8 * (i - row * pieces);
    const bool of_k = row < (p.tensors - 1) * p.G;
    const int head = row < p.G ? row : row - p.G, count = p.K - column;
    const HeadsView from = select(of_k, p.dk_out, p.dv_out), to = select(of_k, p.dk, p.dv);
    const Float8 grad =
        load8(from.values, from.at(window.b, window.number, head) + column, count) * share;
    for (int y = 0; y < window.height; ++y) {
      for (int x = 0; x < window.width; ++x) {
        const int64_t l = window.first + static_cast<int64_t>(y) * p.windows.grid_w + x;
        const int64_t start = to.at(window.b, l, head) + column;
        const bool keep = p.windows.keeps(window.b, l);
        store8(to.values, start, count, by_column([&](int k) { return keep ? grad[k] : 0.0f; }));
      }
    }
  }
}

}  // namespace lumina_kernels::cuda
