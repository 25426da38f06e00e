// gqa_attention's backward in float32, without tensor cores.
#pragma once

#include "cuda/gqa_attention_bwd.cuh"
#include "cuda/gqa_attention_float.cuh"

namespace lumina_kernels::cuda {

// Sizes for head_dims up to 32 * kLaneColumns. A warp owns some rows of two tensors, q and dout or
// k and v, and walks over those of the other two, of which a lane has one of 32.
template <int kLaneColumns, int kSums>
struct AttentionFloatBwdTile {
  static constexpr int kColumns = kLaneColumns, kKeys = 32;  // walked rows
  static constexpr int kWarpRows = kColumns > 4 ? 2 : 8, kRows = kAttentionWarps * kWarpRows;
  static constexpr int kStep = 32 * kColumns + 4;  // an odd number of 16-byte chunks
  // Where the second tensor's part begins, of walked and of own rows; products follow.
  static constexpr int kWalked = kKeys * kStep, kOwn = kRows * kStep;
  static constexpr int kProducts = 2 * kWalked + 2 * kOwn;
  static constexpr size_t kSharedBytes = 4 * (kProducts + kSums * kKeys * kRows);
  static_assert(kSharedBytes <= 99 << 10, "what sm_86, sm_89 and sm_120 have");
};

template <class Tile>
struct AttentionFloatBwdWarp {
  static constexpr int kRows = Tile::kWarpRows, kColumns = Tile::kColumns;
  using Place = AttentionPlace<float>;
  using Params = AttentionBwdParams<float>;

  float weights[kRows], gradients[kRows];  // of this lane's walked row
  Shared<float> own;                       // the warp's rows of the first tensor
  int lane;

  // products[r] = own row r times this lane's walked row.
  __device__ __forceinline__ void multiply(float (&products)[kRows], Shared<float> rows,
                                           Shared<float> walked, int K) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) products[r] = 0.0f;
#pragma unroll 2
    for (int i = 0; i < K; i += 4) {
      const float4 b = load_shared<float4>(walked + lane * Tile::kStep + i);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 a = load_shared<float4>(rows + r * Tile::kStep + i);
        products[r] = fmaf(a.x, b.x, products[r]);
        products[r] = fmaf(a.y, b.y, products[r]);
        products[r] = fmaf(a.z, b.z, products[r]);
        products[r] = fmaf(a.w, b.w, products[r]);
      }
    }
  }
  __device__ __forceinline__ void multiply(Shared<float> walked, int K) {
    multiply(weights, own, walked, K);
    multiply(gradients, own + Tile::kOwn, walked + Tile::kWalked, K);
  }

  // sums += products of all lanes with the walked rows. Lanes exchange them through shared memory
  // of the warp.
  __device__ __forceinline__ void add(float (&sums)[kRows][kColumns],
                                      const float (&products)[kRows], Shared<float> exchange,
                                      Shared<float> walked) const {
#pragma unroll
    for (int r = 0; r < kRows; r += 2) {
      store_shared(exchange + lane * kRows + r, make_float2(products[r], products[r + 1]));
    }
    __syncwarp();
#pragma unroll 4
    for (int row = 0; row < Tile::kKeys; ++row) {
      float b[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) b[c] = walked[row * Tile::kStep + lane + 32 * c];
#pragma unroll
      for (int r = 0; r < kRows; r += 2) {
        const float2 a = load_shared<float2>(exchange + row * kRows + r);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sums[r][c] = fmaf(a.x, b[c], sums[r][c]);
          sums[r + 1][c] = fmaf(a.y, b[c], sums[r + 1][c]);
        }
      }
    }
  }

  // Scores become weights and gradients of weights those of scores, for one pair of a row and a
  // key; with `sum`, the gradient becomes its part of e.
  static __device__ __forceinline__ void differentiate(const Params& p, const Place& at, int branch,
                                                       int row, int key, const float4& terms,
                                                       bool sum, float& x, float& dx) {
    const AttentionKeys<float>& keys = p.fwd.keys[branch];
    const AttentionBias& bias = p.fwd.bias;
    const bool biased = branch == 0 && is_there(bias.values);
    x *= biased ? keys.scale : keys.split.inner;
    if (biased) x += load1(bias.values, at.start(bias, row) + key * bias.step_key);
    x = exp2_approx(fminf((x - terms.x) * keys.split.outer, 0.0f)) * terms.y;
    if (branch == 1 && p.fwd.text_masks.data != nullptr &&
        load_global<uint8_t>(at.mask(row) + key * p.fwd.text_masks.step_key) == 0) {
      x = dx = 0.0f;
    }
    dx = sum ? x * dx : x * fmaf(dx, p.before[branch], -terms.z);
  }

  // Stores row r at to + place(r), unless that is negative.
  template <class At>
  __device__ __forceinline__ void store(const float (&sums)[kRows][kColumns], Global<float> to,
                                        int K, At place) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = place(r);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (at >= 0 && lane + 32 * c < K) to[at + lane + 32 * c] = sums[r][c];
      }
    }
  }
};

template <class Tile>
__device__ __forceinline__ AttentionFloatBwdWarp<Tile> float_warp(Shared<float> shared) {
  AttentionFloatBwdWarp<Tile> warp;
  warp.lane = static_cast<int>(threadIdx.x) % 32;
  warp.own = shared + (2 * Tile::kWalked +
                       static_cast<int>(threadIdx.x) / 32 * Tile::kWarpRows * Tile::kStep);
  return warp;
}

// Copies keys, with zeros for those that do not exist: `rows` of them, starting with the warp's.
template <class Tile, int kRows>
__device__ __forceinline__ void copy_float_keys(Shared<float> to, int second,
                                                const AttentionPlace<float>& at,
                                                const AttentionKeys<float>& keys, int first) {
  for (int i = static_cast<int>(threadIdx.x) / 32; i < kRows; i += kAttentionWarps) {
    const int key = first + i;
    copy_row<Tile>(to + i * Tile::kStep, at.keys(keys.k) + key * keys.k.step_l, at.p.K,
                   key < keys.count);
    copy_row<Tile>(to + second + i * Tile::kStep, at.keys(keys.v) + key * keys.v.step_l, at.p.K,
                   key < keys.count);
  }
}

// The same for rows of q and dout.
template <class Tile, int kRows>
__device__ __forceinline__ void copy_float_rows(Shared<float> to, int second,
                                                const AttentionBwdParams<float>& p,
                                                const AttentionPlace<float>& at, int first) {
  for (int i = static_cast<int>(threadIdx.x) / 32; i < kRows; i += kAttentionWarps) {
    const int row = first + i;
    const bool there = row < p.fwd.rows;
    copy_row<Tile>(to + i * Tile::kStep, p.fwd.q.data + (there ? at.start(p.fwd.q, row) : 0),
                   p.fwd.K, there);
    copy_row<Tile>(to + second + i * Tile::kStep, p.dout.data + (there ? at.start(p.dout, row) : 0),
                   p.fwd.K, there);
  }
}

template <class Tile>
LaunchConfig gqa_attention_float_bwd_config(int64_t blocks) {
  return {dim3(static_cast<unsigned>(blocks)), dim3(kAttentionThreads), Tile::kSharedBytes};
}

// As gqa_attention_dq_kernel.
template <int kLaneColumns>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    gqa_attention_float_dq_kernel(const LUMINA_GRID_CONSTANT AttentionBwdParams<float> p) {
  using Tile = AttentionFloatBwdTile<kLaneColumns, 1>;
  LUMINA_DYNAMIC_SHARED(float, shared);
  const AttentionPlace<float> at(p.fwd, Tile::kRows);
  auto warp = float_warp<Tile>(shared);
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Tile::kWarpRows;
  const int first_row = at.first_row + warp_row;
  const Shared<float> exchange = shared + (Tile::kProducts + Tile::kKeys * warp_row);
  copy_float_rows<Tile, Tile::kRows>(shared + 2 * Tile::kWalked, Tile::kOwn, p, at, at.first_row);
  float sums[Tile::kWarpRows][kLaneColumns] = {}, e[Tile::kWarpRows] = {};
#pragma unroll 1
  for (int pass = p.fwd.text ? 0 : 1; pass < (p.fwd.text ? 3 : 2); ++pass) {
    const int branch = pass == 1 ? 0 : 1;
    const AttentionKeys<float>& keys = p.fwd.keys[branch];
    // After the image's, whose scale comes last, dq has what the text adds as it is.
    const float factor = pass == 2 ? keys.scale / p.before[1] : 1.0f;
    KeyWalk<Tile::kKeys> walk;
    while (walk.next(keys, at.b)) {
      __syncthreads();  // the last tile is read
      copy_float_keys<Tile, Tile::kKeys>(shared, Tile::kWalked, at, keys, walk.first);
      __syncthreads();
      warp.multiply(shared, p.fwd.K);
      const int key = walk.first + warp.lane;
      const bool valid = (walk.bits >> warp.lane & 1) != 0;
#pragma unroll
      for (int r = 0; r < Tile::kWarpRows; ++r) {
        const int row = first_row + r;
        float &x = warp.weights[r], &dx = warp.gradients[r];
        if (!valid || row >= p.fwd.rows) {
          dx = 0.0f;
          continue;
        }
        float4 terms = load_global<float4>(p.terms[branch] + kRowTerms * at.sum(row));
        if (pass == 0) terms.y = terms.w;
        warp.differentiate(p, at, branch, row, key, terms, pass == 0, x, dx);
        if (pass == 1 && p.dbias != nullptr) {
          p.dbias[at.pair(row) * keys.count + key] = dx / p.before[0];
        }
        if (pass == 0) e[r] += dx;
        dx *= factor;
      }
      if (pass > 0) warp.add(sums, warp.gradients, exchange, shared);
    }
#pragma unroll
    for (int r = 0; r < Tile::kWarpRows; ++r) {
      const int row = first_row + r;
      if (pass == 0) {  // completes the terms of both branches, and those of the gate
        const float total = warp_sum(e[r]);
        if (row >= p.fwd.rows || warp.lane != 0) continue;
        const float gate = tanhf(load1(p.fwd.gate, at.head(row)));
        const Global<float> image = p.terms[0] + (kRowTerms * at.sum(row) + 2);
        *image = *image - p.before[0] * (gate * total);
        p.terms[1][kRowTerms * at.sum(row) + 2] = p.before[1] * total;
        p.gate_terms[at.sum(row)] = (1.0f - gate * gate) * total;
      }
#pragma unroll
      for (int c = 0; c < kLaneColumns && pass == 1; ++c) sums[r][c] *= keys.scale / p.before[0];
    }
    __syncthreads();  // the terms are where they belong
  }
  warp.store(sums, p.dq, p.fwd.K, [&](int r) {
    return first_row + r < p.fwd.rows ? at.out(first_row + r) * p.fwd.K : int64_t{-1};
  });
}

// As gqa_attention_dkv_kernel.
template <int kLaneColumns>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    gqa_attention_float_dkv_kernel(const LUMINA_GRID_CONSTANT AttentionBwdParams<float> p) {
  using Tile = AttentionFloatBwdTile<kLaneColumns, 2>;
  LUMINA_DYNAMIC_SHARED(float, shared);
  const DkvPlace place(p, Tile::kRows);
  const AttentionPlace<float> at(p.fwd, place.b, place.g);
  const AttentionKeys<float>& keys = p.fwd.keys[place.branch];
  auto warp = float_warp<Tile>(shared);
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Tile::kWarpRows;
  const int first_key = place.first_key + warp_row;
  const Shared<float> exchange = shared + (Tile::kProducts + 2 * Tile::kKeys * warp_row);
  float dk[Tile::kWarpRows][kLaneColumns] = {}, dv[Tile::kWarpRows][kLaneColumns] = {};
  if (any_valid<Tile::kRows>(keys, at.b, place.first_key)) {
    copy_float_keys<Tile, Tile::kRows>(shared + 2 * Tile::kWalked, Tile::kOwn, at, keys,
                                       place.first_key);
#pragma unroll 1
    for (int first = 0; first < p.fwd.rows; first += Tile::kKeys) {
      __syncthreads();  // the last tile is read
      copy_float_rows<Tile, Tile::kKeys>(shared, Tile::kWalked, p, at, first);
      __syncthreads();
      warp.multiply(shared, p.fwd.K);
      const int row = first + warp.lane;
#pragma unroll
      for (int r = 0; r < Tile::kWarpRows; ++r) {
        float &x = warp.weights[r], &dx = warp.gradients[r];
        if (row < p.fwd.rows && first_key + r < keys.count) {
          const auto terms = load_global<float4>(p.terms[place.branch] + kRowTerms * at.sum(row));
          warp.differentiate(p, at, place.branch, row, first_key + r, terms, false, x, dx);
        } else {
          x = dx = 0.0f;
        }
      }
      warp.add(dv, warp.weights, exchange, shared + Tile::kWalked);
      warp.add(dk, warp.gradients, exchange + Tile::kKeys * Tile::kWarpRows, shared);
    }
#pragma unroll
    for (int r = 0; r < Tile::kWarpRows; ++r) {
      const bool valid = is_valid(keys, at.b, first_key + r);
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) {
        dk[r][c] = valid ? dk[r][c] * (keys.scale / p.before[place.branch]) : 0.0f;
        dv[r][c] = valid ? dv[r][c] : 0.0f;
      }
    }
  }
  const auto to = [&](int r) { return place.out(p, first_key + r); };
  warp.store(dk, p.dk[place.branch], p.fwd.K, to);
  warp.store(dv, p.dv[place.branch], p.fwd.K, to);
}

}  // namespace lumina_kernels::cuda
