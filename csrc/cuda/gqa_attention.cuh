// CUDA kernels of gqa_attention, forward: flash attention over the keys of the image, then over
// those of the text.
#pragma once

#include <utility>

#include "cuda/gqa_attention_finish.cuh"
#include "cuda/gqa_attention_float.cuh"

namespace lumina_kernels::cuda {

// The head_dims with kernels of their own; others take the next larger one, padded with zeros.
using AttentionHeadDims =
    std::integer_sequence<int, 24, 40, 48, 64, 72, 80, 88, 96, 112, 120, 128, 256>;

// The fraction of the tensor cores' multiply-adds at head_dim K that are not padding: products with
// keys take 16 columns at a time (the m16n8k8 at 72 counts in full), products with values yield 8
// columns at a time. 0.947 at 72.
constexpr double attention_useful_fraction(int K) {
  const int size = attention_size(K, AttentionHeadDims());
  return 2.0 * K / static_cast<double>(16 * ceil_div(size, 16) + size);
}

// For `heads` kv heads of all samples together, with `rows` rows each.
template <int kHeadDim, bool kBias>
LaunchConfig gqa_attention_config(int64_t heads, int64_t rows, bool text) {
  using Tile = AttentionTile<kHeadDim, kBias>;
  static_assert(Tile::shared_bytes(true) <= 99 << 10, "what sm_86, sm_89 and sm_120 have");
  return {dim3(static_cast<unsigned>(heads * ceil_div(rows, Tile::kRows))), dim3(kAttentionThreads),
          Tile::shared_bytes(text)};
}

// out = P v + tanh(gate) P_t v_t,  P = softmax(scale q kᵀ + bias) over the valid keys, or 0 without
// any. With kOwnMasks every token may have a mask of its own for the text.
//
// One barrier per tile: once all threads have reached it, the tile has arrived and nobody reads the
// previous one, whose place the next tile may take during the computation with this one.
template <int kHeadDim, Dtype kDtype, bool kBias, bool kOwnMasks>
__global__ void __launch_bounds__(kAttentionThreads, AttentionTile<kHeadDim, kBias>::kBlocks)
    gqa_attention_fwd_kernel(const LUMINA_GRID_CONSTANT AttentionFwdParams<uint16_t> p) {
  using Tile = AttentionTile<kHeadDim, kBias>;
  LUMINA_DYNAMIC_SHARED(uint16_t, tiles);
  const AttentionPlace<uint16_t> at(p, Tile::kRows);
  AttentionWarp<kHeadDim, kDtype, kBias> warp;
  const auto first_row = [&] { return at.first_row + thread_index() / 32 * Tile::kWarpRows; };
  warp.load_queries(at, first_row(), tiles + thread_index() / 32 * Tile::kRowElements);
  // The queries take the sign of the scale, so that products are largest where scores are.
  const bool negative = p.keys[0].scale < 0.0f;
  if (negative) warp.negate_queries();

#pragma unroll 1
  for (int branch = 0; branch < (p.text ? 2 : 1); ++branch) {
    const AttentionKeys<uint16_t>& keys = p.keys[branch];
    const auto copy = [&](int stage, int first) {
      const Shared<uint16_t> to = tiles + 2 * stage * Tile::kElements;
      copy_keys<Tile>(to, at.keys(keys.k), keys.k.step_l, first, keys.count, p.K, keys.vectors);
      copy_keys<Tile>(to + Tile::kElements, at.keys(keys.v), keys.v.step_l, first, keys.count, p.K,
                      keys.vectors);
      copy_async_commit();
    };
    warp.clear();
    KeyWalk<Tile::kKeys> walk;
    bool more = walk.next(keys, at.b);
    __syncthreads();  // queries and the image's last tile are read
    if (more) copy(0, walk.first);
    for (int stage = 0; more; stage ^= 1) {
      const uint64_t bits = walk.bits;
      const int first = walk.first;
      copy_async_wait<0>();
      __syncthreads();
      more = walk.next(keys, at.b);
      if (more) copy(stage ^ 1, walk.first);
      if (first_row() >= p.rows) continue;
      const Shared<uint16_t> tile = tiles + 2 * stage * Tile::kElements;
      warp.multiply_keys(tile);
      const bool biased = kBias && branch == 0;
      if (biased) warp.add_bias(p.bias, at, first_row(), first, keys.count, fabsf(keys.scale));
      if (kOwnMasks && branch == 1 && p.text_masks.data != nullptr) {
        warp.mask_rows(at, first_row(), first, keys.count);
      } else if (bits != walk.kFull) {
        warp.mask(bits);
      }
      warp.exponentials({fabsf(keys.split.inner), keys.split.outer});
      warp.multiply_values(tile + Tile::kElements);
    }
    const Shared<float> sums = as_shared<float>(tiles + Tile::kSumElements);
    finish_softmax(warp, p, branch == 0 ? Values{nullptr, Dtype::kFloat, false} : p.gate,
                   branch == 0 ? p.stats : p.text_stats);
    if (!p.text) break;
    if (branch == 0) {
      keep_sums<false, kAttentionThreads>(warp, sums, static_cast<int>(threadIdx.x));
      if (negative) warp.negate_queries();
    } else {
      keep_sums<true, kAttentionThreads>(warp, sums, static_cast<int>(threadIdx.x));
    }
  }
  store_results<kDtype>(warp, p, tiles);
}

}  // namespace lumina_kernels::cuda
