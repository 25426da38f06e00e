// gqa_attention on tensor cores, for float16 and bfloat16: mma.m16n8k16 and, if K leaves half of
// one, m16n8k8.
#pragma once

#include "cuda/gqa_attention_keys.cuh"

namespace lumina_kernels::cuda {

// Sizes for head_dims up to kHeadDim, a multiple of 8.
template <int kHeadDim, bool kBias>
struct AttentionTile {
  static constexpr int kK = kHeadDim;
  static constexpr bool kTail = kK % 16 != 0;  // of 8 columns
  static constexpr int kSteps = kK / 16;
  // 32 rows per warp, because with 16 ldmatrix would take as long as the products; 16 where 32 rows
  // and their weighted sums do not fit 255 registers.
  static constexpr int kRowTiles = kK < 96 && !kBias ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kAttentionWarps * kWarpRows;
  static constexpr int kKeys = kK > 128 ? 16 : kK > 120 || (kK > 72 && kRowTiles == 2) ? 32 : 64;
  // Rows in shared memory are an odd number of 16-byte chunks apart, so that any 8 consecutive ones
  // are in different banks, as ldmatrix needs. 72 already is odd.
  static constexpr int kChunks = kK / 8, kStep = (kChunks | 1) * 8;
  static constexpr int kElements = kKeys * kStep;  // of a tile of k, or of v
  // Shared memory holds two tiles of k and v, before them the queries, and after them results and
  // their errors, in the same place.
  static constexpr int kRowElements = kWarpRows * kStep;              // of a warp
  static constexpr int kErrors = 2 * kAttentionWarps * kRowElements;  // where they begin, in bytes
  static constexpr int kSumElements = 4 * kElements;  // where the image's sums wait for the text's

  static constexpr size_t shared_bytes(bool text) {
    const int tiles = 8 * kElements + (text ? 4 * kRows * kK : 0), results = kErrors / 2 * 3;
    return tiles > results ? tiles : results;
  }
  // For __launch_bounds__. Two blocks always fit, but ptxas spills registers if told so for some
  // shapes, and if not told for others.
  static constexpr int kBlocks = kRowTiles == 2 ? 1 : 2;
  static_assert(kK % 8 == 0 && (!kTail || kKeys % 32 == 0));
};

template <Dtype kDtype>
__device__ __forceinline__ void mma_k16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  if constexpr (kDtype == Dtype::kHalf) {
    mma_m16n8k16_half(d, a, b);
  } else {
    mma_m16n8k16_bfloat16(d, a, b);
  }
}

template <Dtype kDtype>
__device__ __forceinline__ void mma_k8(float (&d)[4], const uint32_t (&a)[2],
                                       const uint32_t (&b)[1]) {
  if constexpr (kDtype == Dtype::kHalf) {
    mma_m16n8k8_half(d, a, b);
  } else {
    mma_m16n8k8_bfloat16(d, a, b);
  }
}

// Copies rows [first, first + kKeys) of x to shared memory, with zeros for keys from `count` on and
// columns from K on; asynchronously with `vectors`.
template <class Tile>
__device__ __forceinline__ void copy_keys(Shared<uint16_t> to, Global<const uint16_t> x,
                                          int64_t step, int first, int count, int K, bool vectors) {
  if (vectors) {
    constexpr int kPass = kAttentionThreads / Tile::kChunks;  // rows that all threads copy at once
    const int thread = thread_index();
    const int row = thread / Tile::kChunks, column = thread % Tile::kChunks * 8;
    if (row >= kPass) return;
    const int end = column < K ? count - first : 0;
    Global<const uint16_t> from = x + (first + row) * step + column;
#pragma unroll 1  // registers are scarce
    for (int i = row; i < Tile::kKeys; i += kPass) {
      copy_async_16(to + i * Tile::kStep + column, from, i < end ? 16 : 0);
      from += kPass * step;
    }
  } else {
#pragma unroll 1
    for (int i = thread_index(); i < Tile::kKeys * Tile::kK; i += kAttentionThreads) {
      const int row = i / Tile::kK, column = i % Tile::kK;
      uint16_t value = 0;
      if (first + row < count && column < K) {
        value = load_global<uint16_t>(x + (first + row) * step + column);
      }
      to[row * Tile::kStep + column] = value;
    }
  }
}

// 8 numbers, zeros after the first `left`; 16 bytes at once with `vectors`, if all of them exist.
__device__ __forceinline__ uint4 load_chunk(Global<const uint16_t> from, int left, bool vectors) {
  if (vectors && left >= 8) return load_global<uint4>(from);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = 2 * i < left ? load_global<uint16_t>(from + 2 * i) : 0;
    if (2 * i + 1 < left) {
      pairs[i] |= static_cast<uint32_t>(load_global<uint16_t>(from + 2 * i + 1)) << 16;
    }
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// A warp's rows: queries, scores with a tile of keys, weighted sums of values, as fragments. With
// i = 0, 1 for the upper and lower half of a row tile, row [tile][i] is warp row 16 * tile + 8 * i
// + lane / 4, and a fragment's [2 * i], [2 * i + 1] are its columns 2 * (lane % 4) and the next.
template <int kHeadDim, Dtype kDtype, bool kBias>
struct AttentionWarp {
  using Tile = AttentionTile<kHeadDim, kBias>;
  using Place = AttentionPlace<uint16_t>;
  static constexpr int kRowTiles = Tile::kRowTiles, kKeyTiles = Tile::kKeys / 8;
  static constexpr int kOutTiles = Tile::kK / 8;

  uint32_t q[kRowTiles][Tile::kSteps][4], q_tail[kRowTiles][2];
  float scores[kRowTiles][kKeyTiles][4], out[kRowTiles][kOutTiles][4];
  RowSoftmax softmax[kRowTiles][2];

  // `rows` is shared memory of this warp, through which its queries go.
  __device__ __forceinline__ void load_queries(const Place& at, int first_row,
                                               Shared<uint16_t> rows) {
    const AttentionFwdParams<uint16_t>& p = at.p;
    const int lane = lane_index();
#pragma unroll 4
    for (int i = lane; i < Tile::kWarpRows * Tile::kChunks; i += 32) {
      const int row = i / Tile::kChunks, column = i % Tile::kChunks * 8;
      uint4 chunk = make_uint4(0, 0, 0, 0);
      if (first_row + row < p.rows && column < p.K) {
        const Global<const uint16_t> from = p.q.data + at.start(p.q, first_row + row) + column;
        chunk = load_chunk(from, p.K - column, p.q_vectors);
      }
      store_shared(rows + row * Tile::kStep + column, chunk);
    }
    __syncwarp();
    // Matrices: 8 rows and the next 8, columns 0 to 7; columns 8 to 15.
    const Shared<uint16_t> row = rows + lane % 16 * Tile::kStep;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int k = 0; k < Tile::kSteps; ++k) {
        ldmatrix_x4(q[m][k], row + 16 * m * Tile::kStep + 16 * k + lane / 16 * 8);
      }
      if constexpr (Tile::kTail) {
        ldmatrix_x2(q_tail[m], row + 16 * m * Tile::kStep + 16 * Tile::kSteps);
      }
    }
  }

  __device__ __forceinline__ void negate_queries() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int k = 0; k < Tile::kSteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[m][k][i] ^= 0x80008000u;
      }
#pragma unroll
      for (int i = 0; i < 2 && Tile::kTail; ++i) q_tail[m][i] ^= 0x80008000u;
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      softmax[m][0] = softmax[m][1] = RowSoftmax();
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0.0f;
      }
    }
  }

  // scores = q kᵀ. A matrix of ldmatrix is 8 keys and 8 columns.
  __device__ __forceinline__ void multiply_keys(Shared<uint16_t> keys) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
      }
    }
    // Matrices: 8 keys, columns 0 to 7 and 8 to 15; the next 8 keys.
    const int lane = lane_index(), row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < Tile::kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + (8 * n + row) * Tile::kStep + 16 * k + column);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_k16<kDtype>(scores[m][n], q[m][k], {b[0], b[1]});
          mma_k16<kDtype>(scores[m][n + 1], q[m][k], {b[2], b[3]});
        }
      }
    }
    if constexpr (Tile::kTail) {  // matrices: four times 8 keys, the last 8 columns
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 4) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + (8 * n + lane) * Tile::kStep + 16 * Tile::kSteps);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) mma_k8<kDtype>(scores[m][n + i], q_tail[m], {b[i]});
        }
      }
    }
  }

  // scores = scale * scores + bias
  __device__ __forceinline__ void add_bias(const AttentionBias& bias, const Place& at,
                                           int first_row, int first_key, int count, float scale) {
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 16 * m + 8 * i + lane / 4;
        const int64_t start = row < at.p.rows ? at.start(bias, row) : 0;
        const int end = row < at.p.rows ? count : 0;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = first_key + 8 * n + lane % 4 * 2 + e;
            float& score = scores[m][n][2 * i + e];
            score *= scale;
            if (key < end) score += load1(bias.values, start + key * bias.step_key);
          }
        }
      }
    }
  }

  // -inf for keys whose bit is not set.
  __device__ __forceinline__ void mask(uint64_t bits) {
    bits >>= lane_index() % 4 * 2;
    const uint32_t words[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool valid = (words[n / 4] >> (n % 4 * 8 + i % 2) & 1) != 0;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          if (!valid) scores[m][n][i] = kMinusInfinity;
        }
      }
    }
  }

  // -inf for the keys that a row's token does not see.
  __device__ __forceinline__ void mask_rows(const Place& at, int first_row, int first_key,
                                            int count) {
    const int lane = lane_index();
    const int64_t step = at.p.text_masks.step_key;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 16 * m + 8 * i + lane / 4;
        const Global<const uint8_t> seen = at.mask(min(row, at.p.rows - 1));
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = first_key + 8 * n + lane % 4 * 2 + e;
            if (key >= count || load_global<uint8_t>(seen + key * step) == 0) {
              scores[m][n][2 * i + e] = kMinusInfinity;
            }
          }
        }
      }
    }
  }

  // scores become weights; out is rescaled to the new top.
  __device__ __forceinline__ void exponentials(SplitScale split) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        RowSoftmax& row = softmax[m][i];
        float largest = kMinusInfinity;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          largest = fmaxf(largest, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        const float factor = row.rise(largest * split.inner, split), shift = row.shift();
        row.total *= factor;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) {
            const float below = fmaf(scores[m][n][e], split.inner, -shift);
            scores[m][n][e] = exp2_approx(below * split.outer);
            row.total += scores[m][n][e];
          }
        }
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          out[m][n][2 * i] *= factor;
          out[m][n][2 * i + 1] *= factor;
        }
      }
    }
  }

  // out += scores v. Fragments of scores have the layout of those of A already.
  __device__ __forceinline__ void multiply_values(Shared<uint16_t> values) {
    const int lane = lane_index();
    // Matrices: 8 keys and the next 8, columns 0 to 7; columns 8 to 15.
    values += lane % 16 * Tile::kStep;
#pragma unroll
    for (int k = 0; k < Tile::kKeys / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&pair)[4] = scores[m][2 * k + i / 2];
          a[m][i] = pack2(pair[i % 2 * 2], pair[i % 2 * 2 + 1], kDtype);
        }
      }
      const Shared<uint16_t> row = values + 16 * k * Tile::kStep;
#pragma unroll
      for (int n = 0; n < kOutTiles - Tile::kTail; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, row + 8 * n + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_k16<kDtype>(out[m][n], a[m], {b[0], b[1]});
          mma_k16<kDtype>(out[m][n + 1], a[m], {b[2], b[3]});
        }
      }
      if constexpr (Tile::kTail) {
        uint32_t b[2];
        ldmatrix_x2_trans(b, row + 8 * (kOutTiles - 1));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) mma_k16<kDtype>(out[m][kOutTiles - 1], a[m], b);
      }
    }
  }
};

}  // namespace lumina_kernels::cuda
