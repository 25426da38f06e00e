// gqa_attention, forward, for float16 and bfloat16 on sm_90a: one warp group copies tiles of keys
// and values by TMA, the others multiply by wgmma.
//
// A group has 64 rows. While it computes the softmax of a tile, the product of the previous tile
// with its values runs, and those of the other groups. A stage of keys or values goes around
// between two barriers in shared memory, `full` and `free`.
#pragma once

#include "cuda/gqa_attention_hopper_warp.cuh"

namespace lumina_kernels::cuda {

// The warp that copies keys and values of both softmaxes to shared memory.
template <int kHeadDim>
__device__ __forceinline__ void produce(const HopperAttentionFwdParams& params,
                                        const AttentionPlace<uint16_t>& at, Shared<uint16_t> tiles,
                                        HopperRing<kHeadDim> ring) {
  using Tile = HopperTile<kHeadDim>;
  const auto fill = [&](int full, int free, const HopperMaps& maps, Shared<uint16_t> to,
                        int elements, int first) {
    mbarrier_wait(ring.at(free), ring.parity() ^ 1);
    if (lane_index() != 0) return;
    const Shared<uint64_t> barrier = ring.at(full);
    mbarrier_arrive_expect(barrier, 2 * elements);
    const int g = at.g * maps.step_g, b = at.b * maps.step_b;
#pragma unroll
    for (int i = 0; i < Tile::kMain; ++i) {
      tensor_copy(to + i * 64 * Tile::kKeys, maps.main, barrier, 64 * i, first, g, b);
    }
    if (Tile::kTail > 0) {
      tensor_copy(to + Tile::kMain * 64 * Tile::kKeys, maps.tail, barrier, 64 * Tile::kMain, first,
                  g, b);
    }
  };
#pragma unroll 1
  for (int branch = 0; branch < (params.p.text ? 2 : 1); ++branch) {
    WideKeyWalk walk;
#pragma unroll 1
    for (; walk.next(params.p.keys[branch], at.b); ++ring.n) {
      fill(Tile::kKeysFull, Tile::kKeysFree, params.keys[branch],
           tiles + Tile::kKeysAt + ring.stage() * Tile::kKeyElements, Tile::kKeyElements,
           walk.first);
      fill(Tile::kValuesFull, Tile::kValuesFree, params.values[branch],
           tiles + Tile::kValuesAt + ring.stage() * Tile::kValueElements, Tile::kValueElements,
           walk.first);
      __syncwarp();
    }
  }
}

template <int kHeadDim, Dtype kDtype>
__device__ __forceinline__ void consume(const AttentionPlace<uint16_t>& at, int group,
                                        Shared<uint16_t> tiles, HopperRing<kHeadDim> ring) {
  using Tile = HopperTile<kHeadDim>;
  const AttentionFwdParams<uint16_t>& p = at.p;
  const int warp = thread_index() / 32;
  const Shared<uint16_t> queries = tiles + group * Tile::kQueryElements;
  HopperWarp<kHeadDim, kDtype> rows;
  rows.load_queries(at, at.first_row + Tile::kGroupRows * group, warp % 4, queries);
  fence_proxy_async();
  named_barrier(1 + group, 128);
  const Shared<float> sums =
      as_shared<float>(tiles + Tile::kSumsAt) + thread_index() / 32 * Tile::kSums;
#pragma unroll 1
  for (int branch = 0; branch < (p.text ? 2 : 1); ++branch) {
    rows.attend(p.keys[branch], at.b, queries, tiles, ring);
    finish_softmax(rows, p, branch == 0 ? Values{nullptr, Dtype::kFloat, false} : p.gate,
                   branch == 0 ? p.stats : p.text_stats);
    if (!p.text) break;
    if (branch == 0) {
      keep_sums<false, 32>(rows, sums, lane_index());
    } else {
      keep_sums<true, 32>(rows, sums, lane_index());
    }
  }
  __syncwarp();  // the sums are read
  const Shared<uint16_t> results = as_shared<uint16_t>(sums);
  const Shared<uint8_t> errors = as_shared<uint8_t>(results + Tile::kRowElements);
  stage_rows<kDtype>(rows, lane_index(), p.error != nullptr, results, errors);
  store_rows<Tile>(at, at.first_row + thread_index() / 32 * Tile::kWarpRows, lane_index(), results,
                   errors);
}

template <int kHeadDim>
LaunchConfig gqa_attention_hopper_config(int64_t heads, int64_t rows) {
  using Tile = HopperTile<kHeadDim>;
  return {dim3(static_cast<unsigned>(heads * ceil_div(rows, Tile::kRows))), dim3(Tile::kThreads),
          Tile::kSharedBytes};
}

// What gqa_attention_fwd_kernel computes, without a bias and masks of single tokens.
template <int kHeadDim, Dtype kDtype>
__global__ void __launch_bounds__(HopperTile<kHeadDim>::kThreads, 1)
    gqa_attention_hopper_fwd_kernel(const LUMINA_GRID_CONSTANT HopperAttentionFwdParams params) {
  using Tile = HopperTile<kHeadDim>;
  LUMINA_SHARED_TILES(uint16_t, tiles);
  LUMINA_SHARED(uint64_t, barriers, Tile::kBarrierKinds* Tile::kStages);
  const AttentionPlace<uint16_t> at(params.p, Tile::kRows);
  // Groups without a row return at once, and nobody waits for them.
  const int groups = min(Tile::kConsumers, (params.p.rows - at.first_row + 63) / 64);
  if (thread_index() == 0) {
    for (int i = 0; i < Tile::kBarrierKinds * Tile::kStages; ++i) {
      const int kind = i / Tile::kStages;
      const bool full = kind == Tile::kKeysFull || kind == Tile::kValuesFull;
      mbarrier_init(barriers + i, full ? 1 : 4 * groups);
    }
    fence_proxy_async();
  }
  __syncthreads();
  const HopperRing<kHeadDim> ring{barriers};
  const int group = thread_index() / 128;
  if (group == Tile::kConsumers) {
    give_registers<Tile::kProducerRegisters>();
    if (thread_index() / 32 == 4 * Tile::kConsumers) produce(params, at, tiles, ring);
  } else if (group < groups) {
    take_registers<Tile::kConsumerRegisters>();
    consume<kHeadDim, kDtype>(at, group, tiles, ring);
  }
}

}  // namespace lumina_kernels::cuda
