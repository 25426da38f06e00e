// gqa_attention on sm_90a: arguments, tiles, and what a warp computes of them by wgmma.
#pragma once

#include "cuda/gqa_attention_finish.cuh"
#include "cuda/lib/ptx_hopper.cuh"

namespace lumina_kernels::cuda {

// A tensor as columns of 64, in shared memory as rows of 128 bytes, and the columns left.
struct HopperMaps {
  TensorMap main, tail;
  int step_g, step_b;  // 0 if all kv heads, or samples, share theirs
};

struct HopperAttentionFwdParams {
  AttentionFwdParams<uint16_t> p;
  HopperMaps keys[2], values[2];  // of the image, and of the text
};

// Sizes for head_dims up to kHeadDim. Offsets and lengths in shared memory are in numbers of 16
// bits, but for the sums.
template <int kHeadDim>
struct HopperTile {
  static constexpr int kK = kHeadDim;
  // Registers of a consumer: 36 of sums at 72, 64 of scores, 32 of weights.
  static constexpr int kConsumers = kK <= 72 ? 3 : 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static constexpr int kWarpRows = 16, kGroupRows = 64, kRows = kConsumers * kGroupRows;
  static constexpr int kKeys = 128, kStages = 2;
  // Whole columns of 64; those left, of values and, a multiple of 16, of keys and queries.
  static constexpr int kMain = kK / 64, kTail = kK % 64, kKeyTail = (kTail + 15) / 16 * 16;
  static constexpr int kQueryElements = kGroupRows * (64 * kMain + kKeyTail);  // of a group
  static constexpr int kKeyElements = kKeys * (64 * kMain + kKeyTail);
  static constexpr int kValueElements = kKeys * (64 * kMain + kTail);
  static constexpr int kKeysAt = kConsumers * kQueryElements;
  static constexpr int kValuesAt = kKeysAt + kStages * kKeyElements;
  static constexpr int kSumsAt = kValuesAt + kStages * kValueElements;
  // Of a warp, where the image's wait for the text's, and later the results and their errors.
  static constexpr int kSums = kWarpRows * kK;
  static constexpr int kChunks = kK / 8, kStep = (kChunks | 1) * 8;
  static constexpr int kRowElements = kWarpRows * kStep;
  static constexpr size_t kSharedBytes = 2 * kSumsAt + 4 * kSums * 4 * kConsumers;
  static_assert(3 * kRowElements <= 4 * kSums && kSharedBytes <= 225 << 10);
  static_assert(kTail == 0 || kTail == 8 || kTail == 32);
  // Of the tensor cores' multiply-adds, those that are not padding.
  static constexpr double kUseful = 2.0 * kK / (128 * kMain + kKeyTail + kTail);
  enum Barrier { kKeysFull, kKeysFree, kValuesFull, kValuesFree, kBarrierKinds };
};

static_assert(HopperTile<72>::kUseful > 0.94);

// KeyWalk for tiles of 128 keys. Their mask bits are fetched only where one is not set.
struct WideKeyWalk : KeyWalk<64> {
  static constexpr int kKeys = 128;
  uint32_t some = 0, all = 0;  // lanes with a valid key in `mine`, and with 32 of them

  __device__ __forceinline__ WideKeyWalk() { first = -kKeys; }
  __device__ __forceinline__ int lane() const { return first % kWindow / 32; }
  __device__ __forceinline__ bool full() const { return (all >> lane() & 15) == 15; }
  __device__ __forceinline__ uint32_t word(int i) const {
    return __shfl_sync(kAllLanes, mine, lane() + i);
  }

  __device__ __forceinline__ bool next(const AttentionKeys<uint16_t>& keys, int b) {
    do {
      first += kKeys;
      if (first >= keys.count) return false;
      if (first % kWindow != 0) continue;
      read_window(keys, b);
      some = __ballot_sync(kAllLanes, mine != 0);
      all = __ballot_sync(kAllLanes, mine == ~0u);
    } while ((some >> lane() & 15) == 0);
    return true;
  }
};

// The stage of the n-th tile, its barriers, and the parity of its phase.
template <int kHeadDim>
struct HopperRing {
  using Tile = HopperTile<kHeadDim>;
  Shared<uint64_t> barriers;
  int n = 0;

  __device__ __forceinline__ int stage(int after = 0) const { return (n + after) % Tile::kStages; }
  __device__ __forceinline__ int parity(int after = 0) const {
    return (n + after) / Tile::kStages & 1;
  }
  __device__ __forceinline__ Shared<uint64_t> at(int kind, int after = 0) const {
    return barriers + (kind * Tile::kStages + stage(after));
  }
};

// A warp's 16 of the 64 rows of its group, as AttentionWarp.
template <int kHeadDim, Dtype kDtype>
struct HopperWarp {
  using Tile = HopperTile<kHeadDim>;
  using Place = AttentionPlace<uint16_t>;
  static constexpr int kRowTiles = 1, kKeyTiles = Tile::kKeys / 8, kOutTiles = Tile::kK / 8;

  float scores[kKeyTiles][4], out[1][kOutTiles][4];
  uint32_t weights[kKeyTiles / 2][4];  // in flight while the next scores are there
  RowSoftmax softmax[1][2];

  // Puts this warp's rows among those of its group, swizzled as TMA does it.
  __device__ __forceinline__ void load_queries(const Place& at, int group_row, int warp,
                                               Shared<uint16_t> queries) {
    const AttentionFwdParams<uint16_t>& p = at.p;
    constexpr int kPadded = (64 * Tile::kMain + Tile::kKeyTail) / 8;
#pragma unroll 4
    for (int i = lane_index(); i < Tile::kWarpRows * kPadded; i += 32) {
      const int row = 16 * warp + i / kPadded, column = i % kPadded * 8;
      uint4 chunk = make_uint4(0, 0, 0, 0);
      if (group_row + row < p.rows && column < p.K) {
        const Global<const uint16_t> from = p.q.data + at.start(p.q, group_row + row) + column;
        chunk = load_chunk(from, p.K - column, p.q_vectors);
      }
      const int block = column / 64, rest = column % 64;
      const int to = block < Tile::kMain
                         ? swizzled(64 * row + rest, 128)
                         : swizzled(Tile::kKeyTail * row + rest, 2 * Tile::kKeyTail);
      store_shared(queries + 64 * Tile::kGroupRows * block + to, chunk);
    }
  }

  __device__ __forceinline__ void clear() {
    softmax[0][0] = softmax[0][1] = RowSoftmax();
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[0][n][i] = 0.0f;
    }
  }

  // Starts scores = q kᵀ.
  __device__ __forceinline__ void multiply_keys(Shared<uint16_t> queries, Shared<uint16_t> keys) {
    const uint64_t q = matrix_descriptor(queries, 128, 1024, 16);
    const uint64_t key = matrix_descriptor(keys, 128, 1024, 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4 * Tile::kMain; ++k) {
      const int block = k / 4 * 64, column = k % 4 * 16;
      wgmma_keys<kDtype>(scores, advance(q, block * Tile::kGroupRows + column),
                         advance(key, block * Tile::kKeys + column), k > 0);
    }
    if constexpr (Tile::kKeyTail > 0) {
      constexpr int kMain = 64 * Tile::kMain, kBytes = 2 * Tile::kKeyTail;
      const uint64_t q_tail =
          matrix_descriptor(queries + kMain * Tile::kGroupRows, kBytes, 8 * kBytes, 16);
      const uint64_t key_tail =
          matrix_descriptor(keys + kMain * Tile::kKeys, kBytes, 8 * kBytes, 16);
#pragma unroll
      for (int k = 0; k < Tile::kKeyTail / 16; ++k) {
        wgmma_keys<kDtype>(scores, advance(q_tail, 16 * k), advance(key_tail, 16 * k), true);
      }
    }
    wgmma_commit();
  }

  // Starts out += weights v.
  __device__ __forceinline__ void multiply_values(Shared<uint16_t> values) {
    constexpr int kMain = 64 * Tile::kMain, kBytes = 2 * Tile::kTail;
    const uint64_t value = matrix_descriptor(values, 128, 1024, 128 * Tile::kKeys);
    const uint64_t tail =
        matrix_descriptor(values + kMain * Tile::kKeys, kBytes, 8 * kBytes, 8 * kBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kKeys / 16; ++k) {
      wgmma_values<kDtype, kMain, 0>(out[0], weights[k], advance(value, 16 * k * 64));
      if constexpr (Tile::kTail > 0) {
        wgmma_values<kDtype, Tile::kTail, kMain / 8>(out[0], weights[k],
                                                     advance(tail, 16 * k * Tile::kTail));
      }
    }
    wgmma_commit();
  }

  // -inf for keys whose bit is not set.
  __device__ __forceinline__ void mask(const WideKeyWalk& walk) {
#pragma unroll
    for (int w = 0; w < WideKeyWalk::kKeys / 32; ++w) {
      const uint32_t word = walk.word(w) >> lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if ((word >> (8 * n + i % 2) & 1) == 0) scores[4 * w + n][i] = kMinusInfinity;
        }
      }
    }
  }

  // scores become weights; `factor` is that of `out` and of the total for the new top.
  __device__ __forceinline__ void exponentials(SplitScale split, float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      RowSoftmax& row = softmax[0][i];
      float largest = kMinusInfinity;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        largest = fmaxf(largest, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      factor[i] = row.rise(largest * split.inner, split);
      const float shift = row.shift();
      row.total *= factor[i];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          const float below = fmaf(scores[n][e], split.inner, -shift);
          scores[n][e] = exp2_approx(below * split.outer);
          row.total += scores[n][e];
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[0][n][i] *= factor[i / 2];
    }
  }

  // Fragments of scores have the layout of those of A already.
  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int k = 0; k < kKeyTiles / 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[4] = scores[2 * k + i / 2];
        weights[k][i] = pack2(pair[i % 2 * 2], pair[i % 2 * 2 + 1], kDtype);
      }
    }
  }

  // One softmax, up to its total: tiles n and following of the ring.
  __device__ __forceinline__ void attend(const AttentionKeys<uint16_t>& given, int b,
                                         Shared<uint16_t> queries, Shared<uint16_t> tiles,
                                         HopperRing<kHeadDim>& ring) {
    clear();
    WideKeyWalk walk;
    if (!walk.next(given, b)) return;
    const auto start_keys = [&](int after) {
      mbarrier_wait(ring.at(Tile::kKeysFull, after), ring.parity(after));
      multiply_keys(queries, tiles + Tile::kKeysAt + ring.stage(after) * Tile::kKeyElements);
    };
    const auto start_values = [&] {
      mbarrier_wait(ring.at(Tile::kValuesFull), ring.parity());
      multiply_values(tiles + Tile::kValuesAt + ring.stage() * Tile::kValueElements);
    };
    const auto free_stage = [&](int kind, int after) {
      if (lane_index() == 0) mbarrier_arrive(ring.at(kind, after));
    };
    const auto scores_to_weights = [&](float (&factor)[2]) {
      after_wait(scores);
      if (!walk.full()) mask(walk);
      exponentials(given.split, factor);
    };
    float factor[2];
    start_keys(0);
    wgmma_wait<0>();
    free_stage(Tile::kKeysFree, 0);
    scores_to_weights(factor);
    round_weights();
    bool more = walk.next(given, b);
#pragma unroll 1
    while (more) {
      start_keys(1);
      start_values();
      wgmma_wait<1>();  // the scores are there
      free_stage(Tile::kKeysFree, 1);
      scores_to_weights(factor);
      // Its branches keep ptxas from putting the next wait before the exponentials.
      more = walk.next(given, b);
      wgmma_wait<0>();
      free_stage(Tile::kValuesFree, 0);
      after_wait(out[0]);
      after_wait(scores);
      rescale(factor);
      round_weights();
      ++ring.n;
    }
    start_values();
    wgmma_wait<0>();
    free_stage(Tile::kValuesFree, 0);
    after_wait(out[0]);
    ++ring.n;
  }
};

}  // namespace lumina_kernels::cuda
