// gqa_attention in float32, without tensor cores, which would truncate factors to tf32.
#pragma once

#include <utility>

#include "cuda/gqa_attention_keys.cuh"

namespace lumina_kernels::cuda {

using AttentionFloatColumns = std::integer_sequence<int, 2, 3, 4, 8>;  // head_dims, in units of 32

// Sizes for head_dims up to 32 * kLaneColumns.
template <int kLaneColumns>
struct AttentionFloatTile {
  static constexpr int kColumns = kLaneColumns,
                       kKeys = 32;  // a lane has one key, or kColumns columns
  static constexpr int kWarpRows = kColumns > 4 ? 4 : 8, kRows = kAttentionWarps * kWarpRows;
  static constexpr int kStep = 32 * kColumns + 4;  // an odd number of 16-byte chunks, as for mma
  static constexpr int kValues = kKeys * kStep, kQueries = 2 * kValues;  // where they begin
  static constexpr int kWeights = kQueries + kRows * kStep;
  static constexpr size_t kSharedBytes = 4 * (kWeights + kKeys * kRows);
};

// A warp's rows. A lane has one key of a tile, and columns lane, lane + 32, ... of the sums.
template <int kLaneColumns>
struct AttentionFloatWarp {
  using Tile = AttentionFloatTile<kLaneColumns>;
  static constexpr int kRows = Tile::kWarpRows, kColumns = Tile::kColumns;

  float scores[kRows], out[kRows][kColumns], image[kRows][kColumns];
  RowSoftmax softmax[kRows];
  int lane;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      softmax[r] = RowSoftmax();
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[r][c] = 0.0f;
    }
  }

  // scores = q kᵀ, over K rounded up to whole chunks: the columns beyond K are zero.
  __device__ __forceinline__ void multiply_keys(Shared<float> queries, Shared<float> keys, int K) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) scores[r] = 0.0f;
#pragma unroll 2
    for (int i = 0; i < K; i += 4) {
      const float4 k = load_shared<float4>(keys + lane * Tile::kStep + i);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 q = load_shared<float4>(queries + r * Tile::kStep + i);
        scores[r] = fmaf(q.x, k.x, scores[r]);
        scores[r] = fmaf(q.y, k.y, scores[r]);
        scores[r] = fmaf(q.z, k.z, scores[r]);
        scores[r] = fmaf(q.w, k.w, scores[r]);
      }
    }
  }

  // scores become weights, or 0 if not `valid`; out is rescaled.
  __device__ __forceinline__ void exponentials(const AttentionPlace<float>& at, int first_row,
                                               int key, bool valid,
                                               const AttentionKeys<float>& keys, bool biased,
                                               bool own_masks) {
    const AttentionBias& bias = at.p.bias;
    const float multiplier = biased ? keys.scale : keys.split.inner;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float score = scores[r] * multiplier;
      if (biased && valid && first_row + r < at.p.rows) {
        const int64_t i = at.start(bias, first_row + r) + key * bias.step_key;
        score += load1(bias.values, i);
      }
      if (!valid) score = kMinusInfinity;
      if (own_masks && valid && first_row + r < at.p.rows) {
        const uint8_t seen =
            load_global<uint8_t>(at.mask(first_row + r) + key * at.p.text_masks.step_key);
        if (seen == 0) score = kMinusInfinity;
      }
      float largest = score;
#pragma unroll
      for (int bit = 16; bit > 0; bit /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, bit));
      }
      const float factor = softmax[r].rise(largest, keys.split);
      scores[r] = exp2_approx((score - softmax[r].shift()) * keys.split.outer);
      softmax[r].total = softmax[r].total * factor + scores[r];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[r][c] *= factor;
    }
  }

  // out += scores v. The lanes exchange scores through shared memory of the warp; the barriers of
  // every tile make sure that those of the previous tile have been read.
  __device__ __forceinline__ void multiply_values(Shared<float> weights, Shared<float> values) {
#pragma unroll
    for (int r = 0; r < kRows; r += 4) {
      store_shared(weights + lane * kRows + r,
                   make_float4(scores[r], scores[r + 1], scores[r + 2], scores[r + 3]));
    }
    __syncwarp();
#pragma unroll 4
    for (int key = 0; key < Tile::kKeys; ++key) {
      float v[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) v[c] = values[key * Tile::kStep + lane + 32 * c];
#pragma unroll
      for (int r = 0; r < kRows; r += 4) {
        const float4 w = load_shared<float4>(weights + key * kRows + r);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          out[r][c] = fmaf(w.x, v[c], out[r][c]);
          out[r + 1][c] = fmaf(w.y, v[c], out[r + 1][c]);
          out[r + 2][c] = fmaf(w.z, v[c], out[r + 2][c]);
          out[r + 3][c] = fmaf(w.w, v[c], out[r + 3][c]);
        }
      }
    }
  }

  // out becomes the result of the image or, for the text, the gated result of both.
  __device__ __forceinline__ void finish(const AttentionPlace<float>& at, int first_row,
                                         bool text) {
    const Global<float> stats = text ? at.p.text_stats : at.p.stats;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      softmax[r].total = warp_sum(softmax[r].total);
      const int row = first_row + r;
      if (row < at.p.rows && lane == 0) softmax[r].keep(stats + 2 * at.sum(row));
      float weight = 1.0f;
      if (text) weight = row < at.p.rows ? tanhf(load1(at.p.gate, at.head(row))) : 0.0f;
      const float factor = softmax[r].factor(weight);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        out[r][c] = text ? fmaf(out[r][c], factor, image[r][c]) : out[r][c] * factor;
        image[r][c] = out[r][c];
      }
    }
  }

  __device__ __forceinline__ void store_rows(const AttentionPlace<float>& at, int first_row) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_row + r >= at.p.rows) break;
      const Global<float> to = at.p.out + at.out(first_row + r) * at.p.K;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (lane + 32 * c < at.p.K) to[lane + 32 * c] = out[r][c];
      }
    }
  }
};

// A warp copies a row of K numbers, padded with zeros; zeros only if the row does not exist.
template <class Tile>
__device__ __forceinline__ void copy_row(Shared<float> to, Global<const float> from, int K,
                                         bool there) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int c = 0; c < Tile::kColumns; ++c) {
    const int column = lane + 32 * c;
    to[column] = there && column < K ? load_global<float>(from + column) : 0.0f;
  }
}

template <int kLaneColumns>
LaunchConfig gqa_attention_float_config(int64_t heads, int64_t rows) {
  using Tile = AttentionFloatTile<kLaneColumns>;
  return {dim3(static_cast<unsigned>(heads * ceil_div(rows, Tile::kRows))), dim3(kAttentionThreads),
          Tile::kSharedBytes};
}

// out = P v + tanh(gate) P_t v_t, as gqa_attention_fwd_kernel.
template <int kLaneColumns>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    gqa_attention_float_fwd_kernel(const LUMINA_GRID_CONSTANT AttentionFwdParams<float> p) {
  using Tile = AttentionFloatTile<kLaneColumns>;
  LUMINA_DYNAMIC_SHARED(float, tiles);
  const AttentionPlace<float> at(p, Tile::kRows);
  const int number = static_cast<int>(threadIdx.x) / 32, warps_row = number * Tile::kWarpRows;
  const int first_row = at.first_row + warps_row;
  AttentionFloatWarp<kLaneColumns> warp;
  warp.lane = static_cast<int>(threadIdx.x) % 32;
  const Shared<float> queries = tiles + (Tile::kQueries + warps_row * Tile::kStep);
  const Shared<float> weights = tiles + (Tile::kWeights + warps_row * Tile::kKeys);
  for (int r = 0; r < Tile::kWarpRows; ++r) {
    const bool there = first_row + r < p.rows;
    copy_row<Tile>(queries + r * Tile::kStep, p.q.data + (there ? at.start(p.q, first_row + r) : 0),
                   p.K, there);
  }
#pragma unroll 1
  for (int branch = 0; branch < (p.text ? 2 : 1); ++branch) {
    const AttentionKeys<float>& keys = p.keys[branch];
    warp.clear();
    KeyWalk<Tile::kKeys> walk;
    while (walk.next(keys, at.b)) {
      __syncthreads();  // the last tile is read
      for (int i = number; i < Tile::kKeys; i += kAttentionWarps) {
        const int key = walk.first + i;
        copy_row<Tile>(tiles + i * Tile::kStep, at.keys(keys.k) + key * keys.k.step_l, p.K,
                       key < keys.count);
        copy_row<Tile>(tiles + (Tile::kValues + i * Tile::kStep),
                       at.keys(keys.v) + key * keys.v.step_l, p.K, key < keys.count);
      }
      __syncthreads();
      if (first_row >= p.rows) continue;
      warp.multiply_keys(queries, tiles, p.K);
      const bool valid = (walk.bits >> warp.lane & 1) != 0;
      warp.exponentials(at, first_row, walk.first + warp.lane, valid, keys,
                        branch == 0 && p.bias.values.data != nullptr,
                        branch == 1 && p.text_masks.data != nullptr);
      warp.multiply_values(weights, tiles + Tile::kValues);
    }
    warp.finish(at, first_row, branch == 1);
  }
  warp.store_rows(at, first_row);
}

}  // namespace lumina_kernels::cuda
