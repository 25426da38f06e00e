// CUDA kernels of gqa_attention, forward: flash attention over the keys of the image, then over
// those of the text.
#pragma once

#include <utility>

#include "cuda/gqa_attention_float.cuh"
#include "cuda/gqa_attention_mma.cuh"

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

// Divides a warp's sums of one softmax by its total, applies the gate, and writes its statistics.
template <class Warp>
__device__ __forceinline__ void finish_softmax(Warp& warp, const AttentionFwdParams<uint16_t>& p,
                                               const Values& gate, Global<float> stats) {
  const AttentionPlace<uint16_t> at(p, Warp::Tile::kRows);
  const int lane = lane_index();
  const int first_row = at.first_row + thread_index() / 32 * Warp::Tile::kWarpRows;
#pragma unroll
  for (int m = 0; m < Warp::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      RowSoftmax& softmax = warp.softmax[m][i];
      softmax.total += __shfl_xor_sync(kAllLanes, softmax.total, 1);
      softmax.total += __shfl_xor_sync(kAllLanes, softmax.total, 2);
      const int row = first_row + 16 * m + 8 * i + lane / 4;
      if (row < at.p.rows && lane % 4 == 0) softmax.keep(stats + 2 * at.sum(row));
      float weight = 1.0f;
      if (is_there(gate)) weight = row < at.p.rows ? tanhf(load1(gate, at.head(row))) : 0.0f;
      const float factor = softmax.factor(weight);
#pragma unroll
      for (int n = 0; n < Warp::kOutTiles; ++n) {
        warp.out[m][n][2 * i] *= factor;
        warp.out[m][n][2 * i + 1] *= factor;
      }
    }
  }
}

// Moves the sums of the image to shared memory or, with kBack, adds them to those of the text. A
// thread accesses its own sums only.
template <bool kBack, class Warp>
__device__ __forceinline__ void keep_sums(Warp& warp, Shared<float> sums) {
#pragma unroll
  for (int m = 0; m < Warp::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Warp::kOutTiles; ++n) {
      const int place = (m * Warp::kOutTiles + n) * kAttentionThreads;
      const Shared<float> at = sums + 4 * (place + static_cast<int>(threadIdx.x));
      float (&out)[4] = warp.out[m][n];
      if (kBack) {
        const float4 image = load_shared<float4>(at);
        out[0] += image.x, out[1] += image.y, out[2] += image.z, out[3] += image.w;
      } else {
        store_shared(at, make_float4(out[0], out[1], out[2], out[3]));
      }
    }
  }
}

// Results go to shared memory of the warp first, from where they are stored as whole rows.
template <Dtype kDtype, class Warp>
__device__ __forceinline__ void stage_rows(const Warp& warp, int lane, bool with_error,
                                           Shared<uint16_t> rows, Shared<uint8_t> errors) {
#pragma unroll
  for (int m = 0; m < Warp::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int start = (16 * m + 8 * i + lane / 4) * Warp::Tile::kStep + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Warp::kOutTiles; ++n) {
        const float low = warp.out[m][n][2 * i], high = warp.out[m][n][2 * i + 1];
        const uint32_t pair = pack2(low, high, kDtype);
        store_shared(rows + start + 8 * n, pair);
        if (!with_error) continue;
        float rounded[2];
        unpack2(pair, kDtype, rounded[0], rounded[1]);
        const uint32_t both =
            rounding_error(low, rounded[0], kDtype) | rounding_error(high, rounded[1], kDtype) << 8;
        store_shared(errors + start + 8 * n, static_cast<uint16_t>(both));
      }
    }
  }
  __syncwarp();
}

template <class Tile>
__device__ __forceinline__ void store_rows(const AttentionPlace<uint16_t>& at, int first_row,
                                           int lane, Shared<uint16_t> rows,
                                           Shared<uint8_t> errors) {
  const AttentionFwdParams<uint16_t>& p = at.p;
  const bool chunks = p.K % 8 == 0;
#pragma unroll 1
  for (int i = lane; i < Tile::kWarpRows * Tile::kChunks; i += 32) {
    const int row = i / Tile::kChunks, column = i % Tile::kChunks * 8;
    if (first_row + row >= at.p.rows || column >= p.K) continue;
    const int64_t to = at.out(first_row + row) * p.K + column;
    const int from = row * Tile::kStep + column;
    if (chunks) {
      store_global(p.out + to, load_shared<uint4>(rows + from));
      if (p.error != nullptr) store_global(p.error + to, load_shared<uint2>(errors + from));
      continue;
    }
    for (int e = 0; e < min(8, p.K - column); ++e) {
      p.out[to + e] = rows[from + e];
      if (p.error != nullptr) p.error[to + e] = errors[from + e];
    }
  }
}

template <Dtype kDtype, class Warp>
__device__ __forceinline__ void store_results(const Warp& warp,
                                              const AttentionFwdParams<uint16_t>& p,
                                              Shared<uint16_t> tiles) {
  using Tile = typename Warp::Tile;
  __syncthreads();  // the last tile is read
  const int thread = thread_index(), lane = thread % 32;
  const Shared<uint16_t> rows = tiles + thread / 32 * Tile::kRowElements;
  const Shared<uint8_t> errors =
      as_shared<uint8_t>(tiles) + (Tile::kErrors + thread / 32 * Tile::kRowElements);
  stage_rows<kDtype>(warp, lane, p.error != nullptr, rows, errors);
  const AttentionPlace<uint16_t> at(p, Tile::kRows);
  store_rows<Tile>(at, at.first_row + thread / 32 * Tile::kWarpRows, lane, rows, errors);
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
      keep_sums<false>(warp, sums);
      if (negative) warp.negate_queries();
    } else {
      keep_sums<true>(warp, sums);
    }
  }
  store_results<kDtype>(warp, p, tiles);
}

}  // namespace lumina_kernels::cuda
