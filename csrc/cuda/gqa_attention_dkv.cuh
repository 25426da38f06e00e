// gqa_attention's gradients of keys and values, of the image and of the text, on tensor cores.
#pragma once

#include "cuda/gqa_attention_bwd_mma.cuh"

namespace lumina_kernels::cuda {

// Sizes for head_dims up to kHeadDim. kExtras: a bias, or tokens with masks of their own.
template <int kHeadDim, bool kExtras>
struct AttentionDkvTile {
  static constexpr int kK = kHeadDim;
  static constexpr bool kTail = kK % 16 != 0;
  static constexpr int kSteps = kK / 16;
  // 32 keys a warp where v, dk and dv fit into registers, else 16; k is there too then, if it fits.
  static constexpr int kRowTiles = kK <= 72 && !kExtras ? 2 : 1;
  static constexpr bool kKeepKeys = kRowTiles == 1 && kK <= 112;
  static constexpr int kWarpRows = 16 * kRowTiles, kKeys = kAttentionWarps * kWarpRows;
  // dk and dv of 256 columns do not fit: a block sums up half of them.
  static constexpr int kParts = kK > 128 ? 2 : 1, kColumns = kK / kParts, kOutTiles = kColumns / 8;
  static constexpr int kRows = kK > 128 ? 16 : 32;                   // of q and dout, in a tile
  static constexpr int kChunks = kK / 8, kStep = (kChunks | 1) * 8;  // as in the forward
  // Shared memory holds the block's k, then two tiles of q and dout, then their terms. v comes
  // before the tiles, in the same place.
  static constexpr int kOwn = kKeys * kStep, kElements = kRows * kStep;
  static constexpr int kTerms = kOwn + 4 * kElements;
  static constexpr size_t kSharedBytes = 2 * kTerms + 2 * 4 * kRowTerms * kRows;
  static_assert(kK % 8 == 0 && kOwn <= 4 * kElements && kRows <= kAttentionThreads);
  static_assert(kSharedBytes <= 99 << 10, "what sm_86, sm_89 and sm_120 have");
};

template <int kHeadDim, Dtype kDtype, bool kExtras>
struct AttentionDkvWarp {
  using Tile = AttentionDkvTile<kHeadDim, kExtras>;
  using Place = AttentionPlace<uint16_t>;
  using Params = AttentionBwdParams<uint16_t>;
  static constexpr int kRowTiles = Tile::kRowTiles;

  LeftRows<Tile, Tile::kKeepKeys> k;
  LeftRows<Tile, true> v;
  float dk[kRowTiles][Tile::kOutTiles][4], dv[kRowTiles][Tile::kOutTiles][4];
  Products<Tile> weights, gradients;  // of scores

  // Copies rows [first, first + kRows) of q, dout and the terms, zeros where there are none.
  static __device__ __forceinline__ void copy_rows(const Params& p, const Place& at, int branch,
                                                   int first, Shared<uint16_t> to,
                                                   Shared<float> terms) {
    const AttentionHeads<uint16_t>&q = p.fwd.q, &dout = p.dout;
    const int thread = thread_index(), K = p.fwd.K;
    if (thread < Tile::kRows) {
      const bool there = first + thread < p.fwd.rows;
      const int64_t from = there ? kRowTerms * at.sum(first + thread) : 0;
      copy_async_16(terms + kRowTerms * thread, p.terms[branch] + from, there ? 16 : 0);
    }
    const auto start = [&](const AttentionHeads<uint16_t>& x, int token, int head) {
      return x.data + (at.b * x.step_b + token * x.step_l + head * x.step_h);
    };
    if (p.row_vectors) {
      constexpr int kPass =
          kAttentionThreads / Tile::kChunks;  // rows that all threads copy at once
      const int column = thread % Tile::kChunks * 8;
      if (thread / Tile::kChunks >= kPass) return;
#pragma unroll 1  // registers are scarce
      for (int i = thread / Tile::kChunks; i < Tile::kRows; i += kPass) {
        const bool there = first + i < p.fwd.rows && column < K;
        const int row = there ? first + i : 0, token = p.by_R.divide(row);
        const int head = at.g * p.fwd.R + row - token * p.fwd.R, from = there ? column : 0;
        const Shared<uint16_t> place = to + i * Tile::kStep + column;
        copy_async_16(place, start(q, token, head) + from, there ? 16 : 0);
        copy_async_16(place + Tile::kElements, start(dout, token, head) + from, there ? 16 : 0);
      }
      return;
    }
#pragma unroll 1
    for (int i = thread; i < Tile::kRows * Tile::kK; i += kAttentionThreads) {
      const int column = i % Tile::kK, row = first + i / Tile::kK;
      uint16_t of_q = 0, of_dout = 0;
      if (row < p.fwd.rows && column < K) {
        const int token = p.by_R.divide(row), head = at.g * p.fwd.R + row - token * p.fwd.R;
        of_q = load_global<uint16_t>(start(q, token, head) + column);
        of_dout = load_global<uint16_t>(start(dout, token, head) + column);
      }
      const int place = i / Tile::kK * Tile::kStep + column;
      to[place] = of_q;
      to[place + Tile::kElements] = of_dout;
    }
  }

  // Scores become weights, and gradients of weights those of scores.
  __device__ __forceinline__ void differentiate(Shared<float> terms, SplitScale split,
                                                float before) {
    const int lane = lane_index();
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 row = load_shared<float4>(terms + kRowTerms * (8 * n + lane % 4 * 2 + e));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = e; i < 4; i += 2) {
            float &x = weights.of[m][n][i], &dx = gradients.of[m][n][i];
            const float below = fmaf(x, split.inner, -row.x) * split.outer;
            x = exp2_approx(fminf(below, 0.0f)) * row.y;
            dx = x * fmaf(dx, before, -row.z);
          }
        }
      }
    }
  }

  // scores = scale * scores + bias
  __device__ __forceinline__ void add_bias(const Place& at, int first_key, int first_row,
                                           const AttentionKeys<uint16_t>& keys) {
    const AttentionBias& bias = at.p.bias;
    for_products(weights, [&](int key, int row, float& x) {
      key += first_key, row += first_row;
      x *= keys.scale;
      if (row >= at.p.rows || key >= keys.count) return;
      x += load1(bias.values, at.start(bias, row) + key * bias.step_key);
    });
  }

  // Of the text's keys that a row's token does not see neither weights nor gradients count.
  __device__ __forceinline__ void mask_rows(const Place& at, int first_key, int first_row,
                                            int count) {
    const auto hide = [&](int key, int row, float& x) {
      key += first_key, row += first_row;
      const bool there = row < at.p.rows && key < count;
      if (!there || load_global<uint8_t>(at.mask(row) + key * at.p.text_masks.step_key) == 0) {
        x = 0.0f;
      }
    };
    for_products(weights, hide);
    for_products(gradients, hide);
  }

  // Masked keys, of which the sums may be anything, get 0; `factor` completes dk.
  template <class Valid>
  __device__ __forceinline__ void finish(float factor, Valid valid) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = valid(16 * m + i / 2 * 8 + lane_index() / 4);
#pragma unroll
        for (int n = 0; n < Tile::kOutTiles; ++n) {
          dk[m][n][i] = there ? dk[m][n][i] * factor : 0.0f;
          dv[m][n][i] = there ? dv[m][n][i] : 0.0f;
        }
      }
    }
  }
};

template <int kHeadDim, bool kExtras>
LaunchConfig gqa_attention_dkv_config(int64_t key_blocks) {
  using Tile = AttentionDkvTile<kHeadDim, kExtras>;
  return {dim3(static_cast<unsigned>(key_blocks * Tile::kParts)), dim3(kAttentionThreads),
          Tile::kSharedBytes};
}

// dk = scale dSᵀ q, dv = w Pᵀ dout. Scores are transposed here, (keys, rows). What a masked key
// gets stays within its own row of dk and dv, so the loop does no masking but by tokens' own masks;
// a block without a valid key skips it. One barrier per tile, as in the forward.
template <int kHeadDim, Dtype kDtype, bool kExtras>
__global__ void __launch_bounds__(kAttentionThreads)
    gqa_attention_dkv_kernel(const LUMINA_GRID_CONSTANT AttentionBwdParams<uint16_t> p) {
  using Tile = AttentionDkvTile<kHeadDim, kExtras>;
  LUMINA_DYNAMIC_SHARED(uint16_t, shared);
  const auto locate = [&] { return DkvPlace(p, Tile::kKeys, Tile::kParts); };
  const auto warp_row = [] { return thread_index() / 32 * Tile::kWarpRows; };
  const auto first_key = [&] { return locate().first_key + warp_row(); };
  const auto own = [&] { return shared + warp_row() * Tile::kStep; };
  const auto part = [] { return block_index() % Tile::kParts * Tile::kColumns; };  // first column
  const Shared<uint16_t> tiles = shared + Tile::kOwn;
  const Shared<float> terms = as_shared<float>(shared + Tile::kTerms);
  const auto branch = [&] { return locate().branch; };
  const auto keys = [&]() -> const AttentionKeys<uint16_t>& { return p.fwd.keys[branch()]; };
  AttentionDkvWarp<kHeadDim, kDtype, kExtras> warp;
  clear(warp.dk);
  clear(warp.dv);
  if (any_valid<Tile::kKeys>(keys(), locate().b, locate().first_key)) {
    const auto copy_own = [&](Shared<uint16_t> to, const AttentionHeads<uint16_t>& x) {
      const DkvPlace place = locate();
      copy_keys<Tile>(to, x.data + (place.b * x.step_b + place.g * x.step_h), x.step_l,
                      place.first_key, keys().count, p.fwd.K, keys().vectors);
    };
    copy_own(shared, keys().k);
    copy_own(tiles, keys().v);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    warp.k.begin(own());
    warp.v.begin(tiles + warp_row() * Tile::kStep);
    __syncthreads();  // v is read
    const auto copy = [&](int stage, int first) {
      const DkvPlace place = locate();
      warp.copy_rows(p, {p.fwd, place.b, place.g}, place.branch, first,
                     tiles + 2 * stage * Tile::kElements, terms + stage * kRowTerms * Tile::kRows);
      copy_async_commit();
    };
    copy(0, 0);
#pragma unroll 1
    for (int first = 0; first < p.fwd.rows; first += Tile::kRows) {
      const int stage = first / Tile::kRows % 2;
      copy_async_wait<0>();
      __syncthreads();
      if (first + Tile::kRows < p.fwd.rows) copy(stage ^ 1, first + Tile::kRows);
      if (first_key() >= keys().count) continue;
#pragma unroll 1
      for (int step = 0; step < Tile::kRows; step += kWalkRows) {
        const Shared<uint16_t> q =
            tiles + (2 * stage * Tile::kElements + step * Tile::kStep + lane_start<Tile>());
        const Shared<uint16_t> dout = q + Tile::kElements;
        multiply<kDtype>(warp.weights, warp.k, q);
        if (kExtras && branch() == 0 && is_there(p.fwd.bias.values)) {
          const DkvPlace place = locate();
          warp.add_bias({p.fwd, place.b, place.g}, first_key(), first + step, keys());
        }
        multiply<kDtype>(warp.gradients, warp.v, dout);
        warp.differentiate(terms + kRowTerms * (stage * Tile::kRows + step), keys().split,
                           p.before[branch()]);
        if (kExtras && branch() == 1 && p.fwd.text_masks.data != nullptr) {
          const DkvPlace place = locate();
          warp.mask_rows({p.fwd, place.b, place.g}, first_key(), first + step, keys().count);
        }
        add_product<kDtype>(warp.dv, warp.weights, dout + part());
        add_product<kDtype>(warp.dk, warp.gradients, q + part());
      }
    }
    warp.finish(keys().scale / p.before[branch()],
                [&](int row) { return is_valid(keys(), locate().b, first_key() + row); });
  }
  const auto to = [&](int row) {
    const int64_t start = locate().out(p, first_key() + row);
    return start < 0 ? start : start + part();
  };
  const auto store = [&](const auto& sums, Global<uint16_t> grad) {
    store_sums<Tile, kDtype>(sums, own(), grad, p.fwd.K - part(), p.fwd.K % 8 == 0, to);
  };
  store(warp.dk, p.dk[branch()]);
  store(warp.dv, p.dv[branch()]);
}

}  // namespace lumina_kernels::cuda
