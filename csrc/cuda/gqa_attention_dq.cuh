// gqa_attention's gradient of q, and of the bias, on tensor cores.
#pragma once

#include "cuda/gqa_attention_bwd_mma.cuh"

namespace lumina_kernels::cuda {

// Sizes for head_dims up to kHeadDim. kExtras: a bias, or tokens with masks of their own.
template <int kHeadDim, bool kExtras>
struct AttentionDqTile {
  static constexpr int kK = kHeadDim;
  static constexpr bool kTail = kK % 16 != 0;
  static constexpr int kSteps = kK / 16, kOutTiles = kK / 8;
  // 32 rows a warp where q, dout and dq fit into registers, or ldmatrix takes as long as products.
  static constexpr int kRowTiles = kK <= 80 && !kExtras ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kAttentionWarps * kWarpRows;
  static constexpr int kKeys = kK > 128 ? 16 : kK > 80 ? 32 : 64;
  static constexpr bool kKept = kK <= 128;  // q and dout are in registers
  // An odd number of 16-byte chunks, as in the forward.
  static constexpr int kChunks = kK / 8, kStep = (kChunks | 1) * 8;
  // Shared memory holds two tiles of k and v. q and dout come before them in the same place, or
  // after them if they stay there.
  static constexpr int kElements = kKeys * kStep, kOwn = kRows * kStep;
  static constexpr int kOwnStart = kKept ? 0 : 4 * kElements;
  static constexpr int kEnd = kOwnStart + 2 * kOwn;
  static constexpr size_t kSharedBytes = 2 * (kEnd > 4 * kElements ? kEnd : 4 * kElements);
  static_assert(kK % 8 == 0 && kSharedBytes <= 99 << 10, "what sm_86, sm_89 and sm_120 have");
};

// The passes over keys: the first finds e of the text, then come the gradients.
enum class DqPass { kTextSum, kImage, kText };

template <int kHeadDim, Dtype kDtype, bool kExtras>
struct AttentionDqWarp {
  using Tile = AttentionDqTile<kHeadDim, kExtras>;
  using Place = AttentionPlace<uint16_t>;
  using Params = AttentionBwdParams<uint16_t>;
  static constexpr int kRowTiles = Tile::kRowTiles;

  LeftRows<Tile, Tile::kKept> q, dout;
  float sums[kRowTiles][Tile::kOutTiles][4];
  Products<Tile> weights, gradients;  // of scores
  float top[kRowTiles][2], weight[kRowTiles][2], e[kRowTiles][2];

  // Copies rows of q or dout to shared memory of the warp, zeros where there are none.
  static __device__ __forceinline__ void copy_rows(const Place& at, int first_row,
                                                   const AttentionHeads<uint16_t>& x, bool vectors,
                                                   Shared<uint16_t> rows) {
#pragma unroll 4
    for (int i = lane_index(); i < Tile::kWarpRows * Tile::kChunks; i += 32) {
      const int row = i / Tile::kChunks, column = i % Tile::kChunks * 8;
      uint4 chunk = make_uint4(0, 0, 0, 0);
      if (first_row + row < at.p.rows && column < at.p.K) {
        chunk =
            load_chunk(x.data + at.start(x, first_row + row) + column, at.p.K - column, vectors);
      }
      store_shared(rows + row * Tile::kStep + column, chunk);
    }
  }

  // f(row, m, i) for the rows of which this thread has products.
  template <class F>
  static __device__ __forceinline__ void for_rows(int first_row, F f) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) f(first_row + 16 * m + 8 * i + lane_index() / 4, m, i);
    }
  }

  __device__ __forceinline__ void begin(const Params& p, const Place& at, int first_row,
                                        DqPass pass) {
    const int branch = pass == DqPass::kImage ? 0 : 1;
    for_rows(first_row, [&](int row, int m, int i) {
      float4 terms = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < p.fwd.rows) {
        terms = load_global<float4>(p.terms[branch] + kRowTerms * at.sum(row));
      }
      top[m][i] = terms.x;
      weight[m][i] = pass == DqPass::kTextSum ? terms.w : terms.y;
      e[m][i] = pass == DqPass::kTextSum ? 0.0f : terms.z;
      // After the image's, whose scale comes last, dq has what the text adds as it is.
      if (pass == DqPass::kText) weight[m][i] *= p.fwd.keys[1].scale / p.before[1];
    });
  }

  // Completes the terms of both branches, and those of the gate.
  __device__ __forceinline__ void finish_sums(const Params& p, const Place& at, int first_row) {
    for_rows(first_row, [&](int row, int m, int i) {
      float total = e[m][i];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      if (row >= p.fwd.rows || lane_index() % 4 != 0) return;
      const float gate = tanhf(load1(p.fwd.gate, at.head(row)));
      const int64_t sum = at.sum(row);
      const Global<float> image = p.terms[0] + (kRowTerms * sum + 2);
      *image = *image - p.before[0] * (gate * total);
      p.terms[1][kRowTerms * sum + 2] = p.before[1] * total;
      p.gate_terms[sum] = (1.0f - gate * gate) * total;
    });
  }

  // Scores become weights.
  __device__ __forceinline__ void exponentials(SplitScale split) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = weights.of[m][n][i];
          const float below = fmaf(x, split.inner, -top[m][i / 2]) * split.outer;
          x = exp2_approx(fminf(below, 0.0f)) * weight[m][i / 2];
        }
      }
    }
  }

  // e, or the gradients of scores from those of weights.
  __device__ __forceinline__ void differentiate(bool sum, float before) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = gradients.of[m][n][i];
          if (sum) {
            e[m][i / 2] += weights.of[m][n][i] * x;
          } else {
            x = weights.of[m][n][i] * fmaf(x, before, -e[m][i / 2]);
          }
        }
      }
    }
  }

  // Masked keys may be anything: neither their weights nor dP count.
  __device__ __forceinline__ void mask(uint32_t bits) {
    for_products(weights, [&](int, int key, float& x) { x = bits >> key & 1 ? x : 0.0f; });
    for_products(gradients, [&](int, int key, float& x) { x = bits >> key & 1 ? x : 0.0f; });
  }

  // The same for the keys of the text that a row's token does not see.
  __device__ __forceinline__ void mask_rows(const Place& at, int first_row, int first_key,
                                            int count) {
    const auto hide = [&](int row, int key, float& x) {
      const bool there = first_row + row < at.p.rows && first_key + key < count;
      const int64_t step = (first_key + key) * at.p.text_masks.step_key;
      if (!there || load_global<uint8_t>(at.mask(first_row + row) + step) == 0) x = 0.0f;
    };
    for_products(weights, hide);
    for_products(gradients, hide);
  }

  // scores = scale * scores + bias
  __device__ __forceinline__ void add_bias(const Place& at, int first_row, int first_key,
                                           const AttentionKeys<uint16_t>& keys) {
    const AttentionBias& bias = at.p.bias;
    for_products(weights, [&](int row, int key, float& x) {
      x *= keys.scale;
      if (first_row + row >= at.p.rows || first_key + key >= keys.count) return;
      x += load1(bias.values, at.start(bias, first_row + row) + (first_key + key) * bias.step_key);
    });
  }

  __device__ __forceinline__ void store_dbias(const Params& p, const Place& at, int first_row,
                                              int first_key) {
    const float after = 1.0f / p.before[0];
    for_products(gradients, [&](int row, int key, float& x) {
      row += first_row, key += first_key;
      if (row >= p.fwd.rows || key >= p.fwd.keys[0].count) return;
      p.dbias[at.pair(row) * p.fwd.keys[0].count + key] = x * after;
    });
  }
};

template <int kHeadDim, bool kExtras>
LaunchConfig gqa_attention_dq_config(int64_t heads, int64_t rows) {
  using Tile = AttentionDqTile<kHeadDim, kExtras>;
  return {dim3(static_cast<unsigned>(heads * ceil_div(rows, Tile::kRows))), dim3(kAttentionThreads),
          Tile::kSharedBytes};
}

// dq = scale dS k + scale_text dS_text k_text, dbias = dS, and e of both branches for the third
// kernel. One barrier per tile, as in the forward.
template <int kHeadDim, Dtype kDtype, bool kExtras>
__global__ void __launch_bounds__(kAttentionThreads)
    gqa_attention_dq_kernel(const LUMINA_GRID_CONSTANT AttentionBwdParams<uint16_t> p) {
  using Tile = AttentionDqTile<kHeadDim, kExtras>;
  LUMINA_DYNAMIC_SHARED(uint16_t, tiles);
  const AttentionPlace<uint16_t> at(p.fwd, Tile::kRows);
  const auto warp_row = [] { return thread_index() / 32 * Tile::kWarpRows; };
  const auto first_row = [&] { return at.first_row + warp_row(); };
  AttentionDqWarp<kHeadDim, kDtype, kExtras> warp;
  const Shared<uint16_t> own = tiles + (Tile::kOwnStart + warp_row() * Tile::kStep);
  warp.copy_rows(at, first_row(), p.fwd.q, p.row_vectors, own);
  warp.copy_rows(at, first_row(), p.dout, p.row_vectors, own + Tile::kOwn);
  __syncwarp();
  warp.q.begin(own);
  warp.dout.begin(own + Tile::kOwn);
  clear(warp.sums);

#pragma unroll 1
  for (int i = p.fwd.text ? 0 : 1; i < (p.fwd.text ? 3 : 2); ++i) {
    const DqPass pass = static_cast<DqPass>(i);
    const int branch = pass == DqPass::kImage ? 0 : 1;
    const AttentionKeys<uint16_t>& keys = p.fwd.keys[branch];
    const auto copy = [&](int stage, int first) {
      const Shared<uint16_t> to = tiles + 2 * stage * Tile::kElements;
      copy_keys<Tile>(to, at.keys(keys.k), keys.k.step_l, first, keys.count, p.fwd.K, keys.vectors);
      copy_keys<Tile>(to + Tile::kElements, at.keys(keys.v), keys.v.step_l, first, keys.count,
                      p.fwd.K, keys.vectors);
      copy_async_commit();
    };
    KeyWalk<Tile::kKeys> walk;
    bool more = walk.next(keys, at.b);
    __syncthreads();  // rows, the last tile, and the terms of the last pass are where they belong
    warp.begin(p, at, first_row(), pass);
    if (more) copy(0, walk.first);
    for (int stage = 0; more; stage ^= 1) {
      const uint64_t tile_bits = walk.bits;
      const int first = walk.first;
      copy_async_wait<0>();
      __syncthreads();
      more = walk.next(keys, at.b);
      if (more) copy(stage ^ 1, walk.first);
      if (first_row() >= p.fwd.rows) continue;
#pragma unroll 1
      for (int step = 0; step < Tile::kKeys; step += kWalkRows) {
        const uint32_t bits = static_cast<uint32_t>(tile_bits >> step) & 0xFFFF;
        if (bits == 0) continue;
        const Shared<uint16_t> k =
            tiles + (2 * stage * Tile::kElements + step * Tile::kStep + lane_start<Tile>());
        multiply<kDtype>(warp.weights, warp.q, k);
        const bool biased = kExtras && branch == 0 && is_there(p.fwd.bias.values);
        if (biased) warp.add_bias(at, first_row(), first + step, keys);
        warp.exponentials(keys.split);
        multiply<kDtype>(warp.gradients, warp.dout, k + Tile::kElements);
        if (kExtras && branch == 1 && p.fwd.text_masks.data != nullptr) {
          warp.mask_rows(at, first_row(), first + step, keys.count);
        } else if (bits != 0xFFFF) {
          warp.mask(bits);
        }
        warp.differentiate(pass == DqPass::kTextSum, p.before[branch]);
        if (pass == DqPass::kTextSum) continue;
        if (biased && p.dbias != nullptr) warp.store_dbias(p, at, first_row(), first + step);
        add_product<kDtype>(warp.sums, warp.gradients, k);
      }
    }
    if (pass == DqPass::kTextSum) warp.finish_sums(p, at, first_row());
    if (pass == DqPass::kImage) scale_by(warp.sums, keys.scale / p.before[0]);
  }
  __syncthreads();  // the last tile is read
  store_sums<Tile, kDtype>(warp.sums, tiles + warp_row() * Tile::kStep, p.dq, p.fwd.K,
                           p.fwd.K % 8 == 0, [&](int row) {
                             row += first_row();
                             return row < p.fwd.rows ? at.out(row) * p.fwd.K : -1;
                           });
}

}  // namespace lumina_kernels::cuda
