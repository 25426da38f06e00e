// What the forward kernels of gqa_attention on tensor cores do once a softmax is through: totals,
// the gate, results.
#pragma once

#include "cuda/gqa_attention_mma.cuh"

namespace lumina_kernels::cuda {

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
// thread, one of kThreads, accesses its own sums only.
template <bool kBack, int kThreads, class Warp>
__device__ __forceinline__ void keep_sums(Warp& warp, Shared<float> sums, int thread) {
#pragma unroll
  for (int m = 0; m < Warp::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Warp::kOutTiles; ++n) {
      const int place = (m * Warp::kOutTiles + n) * kThreads;
      const Shared<float> at = sums + 4 * (place + thread);
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

}  // namespace lumina_kernels::cuda
