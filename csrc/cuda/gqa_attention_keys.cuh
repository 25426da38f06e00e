// The arguments of the CUDA kernels of gqa_attention, and the iteration over tiles of keys.
#pragma once

#include <utility>

#include "cuda/lib/ptx.cuh"
#include "split_scale.h"

namespace lumina_kernels::cuda {

// Parameters that are indexed at run time stay in constant memory.
#ifdef LUMINA_CUDA_HOST
#define LUMINA_GRID_CONSTANT
#else
#define LUMINA_GRID_CONSTANT __grid_constant__
#endif

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// The smallest of `kSizes`, which ascend, that is not below K.
template <int... kSizes>
constexpr int attention_size(int K, std::integer_sequence<int, kSizes...>) {
  int found = 0;
  ((found = found == 0 && K <= kSizes ? kSizes : found), ...);
  return found;
}

// Head h of token l of sample b, K numbers without gaps, starts at data[b * step_b + l * step_l +
// h * step_h].
template <class T>
struct AttentionHeads {
  Global<const T> data;
  int64_t step_b, step_l, step_h;
};

// Keys and values of one softmax.
template <class T>
struct AttentionKeys {
  AttentionHeads<T> k, v;
  Global<const uint8_t> mask;  // (B, count), null if all keys are valid
  int64_t mask_step;           // from sample to sample
  int count;
  float scale;       // of the scores
  SplitScale split;  // kUnscaled with a bias, which is added to scaled scores
  bool vectors;  // every head of k and v starts at a multiple of 16 bytes, and K is a multiple of 8
  bool mask_vectors;  // every sample's mask starts at a multiple of 16 bytes
};

// Added to the scores: bias(b, h, l, key). A step is 0 where the bias is broadcast.
struct AttentionBias {
  Values values;
  int64_t step_b, step_h, step_l, step_key;
};

// Which keys of the text each token sees, bytes of 0 or 1 at data[b * step_b + l * step_l + key *
// step_key]; null if the keys have a mask that all tokens share, or none.
struct AttentionOwnMasks {
  Global<const uint8_t> data;
  int64_t step_b, step_l, step_key;
};

template <class T>
struct AttentionFwdParams {
  AttentionHeads<T> q;
  AttentionKeys<T> keys[2];  // of the image, and of the text if `text`
  Values gate;               // (H,)
  AttentionBias bias;
  AttentionOwnMasks text_masks;
  Global<T> out;                    // (B, L, H, K)
  Global<uint8_t> error;            // the rounding error of out, int8, or null
  Global<float> stats, text_stats;  // (B, G, L, R, 2)
  int L, G, R, K;
  int rows, row_blocks;  // L * R rows of a kv head, and the blocks they take
  bool q_vectors;        // every head of q starts at a multiple of 16 bytes
  bool text;             // even if it has no keys
};

// The rows of a block: row = token * R + head of the group, for kv head g of sample b.
template <class T>
struct AttentionPlace {
  const AttentionFwdParams<T>& p;
  int b, g, first_row;

  __device__ __forceinline__ AttentionPlace(const AttentionFwdParams<T>& given, int block_rows)
      : p(given) {
    const int block = block_index(), head = block / p.row_blocks;
    first_row = (block - head * p.row_blocks) * block_rows;
    b = head / p.G;
    g = head - b * p.G;
  }
  // Of all rows.
  __device__ __forceinline__ AttentionPlace(const AttentionFwdParams<T>& given, int b, int g)
      : p(given), b(b), g(g), first_row(0) {}

  __device__ __forceinline__ int token(int row) const {
    return static_cast<int>(static_cast<unsigned>(row) / static_cast<unsigned>(p.R));
  }
  __device__ __forceinline__ int head(int row) const { return g * p.R + row - token(row) * p.R; }
  // Where a row is in (B, G, L, R), in (B, H, L), and in (B, L, H).
  __device__ __forceinline__ int64_t sum(int row) const {
    return (static_cast<int64_t>(b) * p.G + g) * p.rows + row;
  }
  __device__ __forceinline__ int64_t pair(int row) const {
    return (static_cast<int64_t>(b) * p.G * p.R + head(row)) * p.L + token(row);
  }
  __device__ __forceinline__ int64_t out(int row) const {
    return (static_cast<int64_t>(b) * p.L + token(row)) * p.G * p.R + head(row);
  }
  __device__ __forceinline__ Global<const T> keys(const AttentionHeads<T>& x) const {
    return x.data + (b * x.step_b + g * x.step_h);
  }
  // Where a token's mask of its own begins.
  __device__ __forceinline__ Global<const uint8_t> mask(int row) const {
    const AttentionOwnMasks& masks = p.text_masks;
    return masks.data + (b * masks.step_b + token(row) * masks.step_l);
  }
  // Where the row begins in q, or in the bias.
  template <class Steps>
  __device__ __forceinline__ int64_t start(const Steps& x, int row) const {
    return b * x.step_b + token(row) * x.step_l + head(row) * x.step_h;
  }
};

// Packs 4 bytes of 0 or 1 into 4 bits.
__device__ __forceinline__ uint32_t pack_bools(uint32_t bytes) { return bytes * 0x10204080u >> 28; }

// Iterates over the tiles of kKeys keys that have a valid one. Every warp does so by itself, with
// the same result. A lane keeps the mask bits of 32 of 1024 keys, so that a tile costs two
// shuffles.
template <int kKeys>
struct KeyWalk {
  int first = -kKeys;  // key of the tile
  uint64_t bits = 0;   // its valid keys, the first one lowest
  uint32_t mine = 0;   // the same of 32 keys, number `lane` of these in the window

  static constexpr int kWindow = 1024;
  static constexpr uint64_t kFull = ~uint64_t{0} >> (64 - kKeys);

  // Moves to the next tile of sample b; false after the last one.
  template <class T>
  __device__ __forceinline__ bool next(const AttentionKeys<T>& keys, int b) {
    return next(keys, b, keys.count);
  }
  // The same up to key `end`.
  template <class T>
  __device__ __forceinline__ bool next(const AttentionKeys<T>& keys, int b, int end) {
    do {
      first += kKeys;
      if (first >= end) return false;
      if (first % kWindow == 0) read_window(keys, b);
      const int word = first / 32;
      bits = __shfl_sync(kAllLanes, mine, word);
      if (kKeys > 32) {
        bits |= static_cast<uint64_t>(__shfl_sync(kAllLanes, mine, word | 1)) << 32;
      } else {
        bits = bits >> first % 32 & kFull;
      }
    } while (bits == 0);
    return true;
  }

  template <class T>
  __device__ __forceinline__ void read_window(const AttentionKeys<T>& keys, int b) {
    const int start = first + 32 * lane_index(), left = keys.count - start;
    mine = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    if (keys.mask == nullptr || left <= 0) return;
    const Global<const uint8_t> mask = keys.mask + (b * keys.mask_step + start);
    if (keys.mask_vectors && left >= 32) {
      const uint4 low = load_global<uint4>(mask), high = load_global<uint4>(mask + 16);
      mine = pack_bools(low.x) | pack_bools(low.y) << 4 | pack_bools(low.z) << 8 |
             pack_bools(low.w) << 12 | pack_bools(high.x) << 16 | pack_bools(high.y) << 20 |
             pack_bools(high.z) << 24 | pack_bools(high.w) << 28;
    } else {
      mine = 0;
#pragma unroll 8
      for (int i = 0; i < 32; ++i) {
        if (i < left) mine |= static_cast<uint32_t>(load_global<uint8_t>(mask + i)) << i;
      }
    }
  }
};

// The same for the keys [start, end) alone, both multiples of kKeys, or end the number of keys.
template <int kKeys>
struct KeyRangeWalk : KeyWalk<kKeys> {
  using Walk = KeyWalk<kKeys>;
  int end;

  template <class T>
  __device__ __forceinline__ KeyRangeWalk(const AttentionKeys<T>& keys, int b, int start, int end)
      : end(end) {
    this->first = start / Walk::kWindow * Walk::kWindow;
    this->read_window(keys, b);
    this->first = start - kKeys;
  }
  template <class T>
  __device__ __forceinline__ bool next(const AttentionKeys<T>& keys, int b) {
    return Walk::next(keys, b, end);
  }
};

// --- online softmax of a row ---

// A row's scores so far: `top` is the largest, times `inner`, and `total` is this thread's part of
// the sum of the weights.
struct RowSoftmax {
  float top = kMinusInfinity, total = 0.0f;

  // Includes the largest new score, times `inner`, and returns the factor by which earlier sums
  // have to be multiplied.
  __device__ __forceinline__ float rise(float largest, SplitScale split) {
    const float before = top;
    top = fmaxf(top, largest);
    return exp2_approx((before - shift()) * split.outer);
  }
  // What to subtract from a score: something finite as long as no key was valid.
  __device__ __forceinline__ float shift() const { return top == kMinusInfinity ? 0.0f : top; }
  // These two once `total` has been summed over threads. What is kept makes weights of 0 in a row
  // without a valid key.
  __device__ __forceinline__ void keep(Global<float> stats) const {
    const bool none = total == 0.0f;  // and NaN stays NaN
    stats[0] = none ? 0.0f : top;
    stats[1] = none ? -kMinusInfinity : log2f(total);
  }
  __device__ __forceinline__ float factor(float weight) const {
    return total > 0.0f ? weight / total : 0.0f;
  }
};

// The error of rounding to 16 bits, in 127ths of the largest possible one; an int8 in the lowest
// byte.
__device__ __forceinline__ uint32_t rounding_error(float exact, float rounded, Dtype dtype) {
  const float most = fabsf(rounded) * (dtype == Dtype::kHalf ? 0x1p-11f : 0x1p-8f);
  const float part = most > 0.0f ? __fdividef(exact - rounded, most) : 0.0f;
  return __float2int_rn(fminf(fmaxf(part, -1.0f), 1.0f) * 127.0f) & 0xFF;
}

}  // namespace lumina_kernels::cuda
