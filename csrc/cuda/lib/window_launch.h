// What the launchers that average over windows share.
#pragma once

#include <algorithm>

#include "cuda/lib/rope_launch.h"
#include "cuda/lib/window.cuh"

namespace lumina_kernels::cuda {

// The windows of a grid (T, H, W); `key_mask` (B, L) or none.
inline MaskedWindows windows_of(const std::vector<int64_t>& grid, int64_t factor,
                                const OptionalTensor& key_mask) {
  const int64_t side = std::max<int64_t>({grid[1], grid[2], 1});
  const int64_t f = std::min(factor, side);
  return {.T = static_cast<int>(grid[0]),
          .grid_h = static_cast<int>(grid[1]),
          .grid_w = static_cast<int>(grid[2]),
          .factor = static_cast<int>(f),
          .rows = static_cast<int>(ceil_div(grid[1], f)),
          .columns = static_cast<int>(ceil_div(grid[2], f)),
          .mask = pointer_to<const unsigned char>(key_mask),
          .mask_b = key_mask ? key_mask->stride(0) : 0,
          .mask_l = key_mask ? key_mask->stride(1) : 0};
}

// Windows of one sample.
inline int64_t count_of(const MaskedWindows& windows) {
  return static_cast<int64_t>(windows.T) * windows.rows * windows.columns;
}

// The gradient of v, (B, L, G, K), from that of its means over windows.
Tensor window_mean_bwd(const Tensor& dv_out, const Tensor& counts, const MaskedWindows& windows);

}  // namespace lumina_kernels::cuda
