// The arguments of the CUDA kernels of gqa_attention's backward.
//
// Per branch, with the weights P of the softmax and w = 1 (image) or tanh(gate) (text):
//
//   dP = dout vᵀ,  e = sum P dP = dout . (P v),  dS = w P (dP - e),
//   dq += scale dS k,  dk = scale dSᵀ q,  dv = w Pᵀ dout,  dgate = (1 - tanh²) sum e_text
//
// The text is short, so its e is summed over its keys. The image's e is dout . out - w e_text, with
// out as it was before rounding: the forward kept the error.
//
// Three kernels follow each other. The first computes dout . out; the second dq, one block for some
// query rows, and before that e of both branches; the third dk and dv, one block for some keys.
// Nothing is atomic: who owns a row, or a key, walks over all keys, or all rows.
#pragma once

#include "cuda/gqa_attention_keys.cuh"

namespace lumina_kernels::cuda {

// n / d for 0 <= n < 2^31, by a multiplication.
struct Divider {
  uint32_t factor;
  int shift;

  Divider() : Divider(1) {}
  explicit Divider(int d) : shift(31) {
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    factor = static_cast<uint32_t>((uint64_t{1} << shift) / static_cast<uint64_t>(d) + 1);
  }
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * factor >> shift);
  }
};

// What the backward needs of a row and a branch, as a float4: the largest score, as in RowSoftmax;
// w over the total of the weights; `before` times e; 1 over the total. Without a key these are 0.
constexpr int kRowTerms = 4;

template <class T>
struct AttentionBwdParams {
  AttentionFwdParams<T> fwd;  // what was its result is read here
  AttentionHeads<T> dout;
  Global<float> terms[2];    // (B, G, L, R, kRowTerms)
  Global<float> gate_terms;  // (B, G, L, R), of which the sum is the gradient of the gate
  Global<T> dq, dk[2], dv[2];
  Global<float> dbias;  // (B, H, L, keys), or null
  // A power of 2 that gradients of scores are multiplied by before the sums over rows or keys,
  // which might else be infinite where these are large and the scale is small.
  float before[2];
  Divider by_R, by_G;
  int key_blocks[2];  // of a kv head, in the third kernel
  int text_blocks;    // those of all heads
  Divider by_blocks[2];
  bool row_vectors;  // every head of q and dout starts at a multiple of 16 bytes, and K is one of 8
};

// The keys of a block of the third kernel, which it shares with `parts` - 1 others: those of the
// text come first, as a few blocks take as long as one of many. Registers are scarce there, so it
// is found again, without a division, where it is needed.
struct DkvPlace {
  int branch, b, g, first_key;

  template <class T>
  __device__ __forceinline__ DkvPlace(const AttentionBwdParams<T>& p, int keys, int parts = 1) {
    int block = block_index() / parts;
    branch = block < p.text_blocks ? 1 : 0;
    if (branch == 0) block -= p.text_blocks;
    const int head = p.by_blocks[branch].divide(block);
    b = p.by_G.divide(head);
    g = head - b * p.fwd.G;
    first_key = (block - head * p.key_blocks[branch]) * keys;
  }
  // Where a key is in (B, keys, G, K), negative if it does not exist.
  template <class T>
  __device__ __forceinline__ int64_t out(const AttentionBwdParams<T>& p, int key) const {
    const int count = p.fwd.keys[branch].count;
    if (key >= count) return -1;
    return ((static_cast<int64_t>(b) * count + key) * p.fwd.G + g) * p.fwd.K;
  }
};

// Whether a key exists and is not masked.
template <class T>
__device__ __forceinline__ bool is_valid(const AttentionKeys<T>& keys, int b, int key) {
  if (key >= keys.count) return false;
  return keys.mask == nullptr || load_global<uint8_t>(keys.mask + (b * keys.mask_step + key)) != 0;
}

// Whether one of kKeys keys is; the same for every warp.
template <int kKeys, class T>
__device__ __forceinline__ bool any_valid(const AttentionKeys<T>& keys, int b, int first) {
  bool any = false;
  for (int i = lane_index(); i < kKeys; i += 32) any |= is_valid(keys, b, first + i);
  return __any_sync(kAllLanes, any);
}

}  // namespace lumina_kernels::cuda
