// The arguments of the CPU kernels of gqa_attention, and the memory that a thread works in.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <memory>

#include "cpu/lib/rows.h"
#include "split_scale.h"

namespace lumina_kernels::cpu {

// Bytes of 0 or 1, null if all keys are valid. A mask of (B, keys), or one that is expanded over
// the tokens, is that of all tokens, and the step l is 0; else every token has its own.
struct KeyMask {
  const uint8_t* bits = nullptr;
  int64_t b = 0, l = 0, n = 0;

  const uint8_t* of(int64_t sample, int64_t token) const {
    return bits ? bits + (sample * b + token * l) : nullptr;
  }
};

inline KeyMask mask_of(const OptionalTensor& mask) {
  if (!mask) return {};
  const int64_t last = mask->dim() - 1;
  return {.bits = static_cast<const uint8_t*>(mask->data_ptr()),
          .b = mask->stride(0),
          .l = last == 2 && mask->size(1) > 1 ? mask->stride(1) : 0,
          .n = mask->stride(last)};
}

// Keys and values of one softmax, and which of them are valid.
struct Keys {
  Rows k, v;
  KeyMask mask;
  int64_t count = 0;
  float scale = 0;          // of the scores, for base e
  SplitScale split;         // the same for base 2
  std::vector<float> bias;  // (B, count) if there is one that all queries share, else empty

  bool own_masks() const { return mask.l != 0; }
};

// The keys of sample b that are valid, one after the other; where tokens have masks of their own,
// for one of the tokens [first, end). A bias of -inf is a mask.
class ValidKeys {
 public:
  ValidKeys(const Keys& keys, int64_t b, int64_t first, int64_t end)
      : count_(keys.count), bits_(keys.mask.of(b, first)), step_(keys.mask.n) {
    if (!keys.bias.empty()) bias_ = keys.bias.data() + b * count_;
    if (!keys.own_masks()) return;
    seen_.resize(count_);
    for (int64_t l = first; l < end; ++l) {
      const uint8_t* bits = keys.mask.of(b, l);
      for (int64_t n = 0; n < count_; ++n) seen_[n] |= bits[n * step_];
    }
    bits_ = seen_.data(), step_ = 1;
  }

  // Writes down the next ones, at most `limit`, and returns how many.
  int64_t next(int64_t limit, int32_t* found) {
    int64_t n = 0;
    for (; n < limit && next_ < count_; ++next_)
      if ((!bits_ || bits_[next_ * step_]) && (!bias_ || bias_[next_] != -INFINITY))
        found[n++] = static_cast<int32_t>(next_);
    return n;
  }

 private:
  int64_t count_, next_ = 0;
  const uint8_t* bits_;
  int64_t step_;
  const float* bias_ = nullptr;
  std::vector<uint8_t> seen_;
};

// Added to the scores of the first softmax. A step is 0 where the bias is broadcast.
struct Bias {
  Row base;
  int64_t b = 0, h = 0, l = 0, n = 0;
};

inline Bias bias_of(const OptionalTensor& bias) {
  if (!bias) return {};
  Bias found{row_of(*bias)};
  int64_t* steps[] = {&found.n, &found.l, &found.h, &found.b};
  for (int64_t i = 0; i < bias->dim(); ++i) {
    const int64_t axis = bias->dim() - 1 - i;
    *steps[i] = bias->size(axis) == 1 ? 0 : bias->stride(axis);
  }
  return found;
}

struct Attention {
  int64_t B, L, H, G, K, R;  // R = H / G; a row of a kv head is token * R + head of its group
  Rows q;
  Keys image, text;
  Bias bias;
  std::vector<float> gate;  // tanh of the text's gate, (H,)

  int64_t rows() const { return L * R; }
  // The valid keys of some rows of sample b.
  ValidKeys valid(const Keys& keys, int64_t b, int64_t first, int64_t rows) const {
    return {keys, b, first / R, ceil_div(first + rows, R)};
  }
  // Where a row begins in a contiguous (B, L, H, K).
  int64_t offset(int64_t b, int64_t g, int64_t row) const {
    return ((b * L + row / R) * H + g * R + row % R) * K;
  }
  // The row of a tensor (B, L, H, K) that belongs to `row` of kv head g.
  Row head(const Rows& x, int64_t b, int64_t g, int64_t row) const {
    return x(b, row / R, g * R + row % R);
  }
};

// One value on its own.
inline float value_of(Row at) {
  switch (at.dtype) {
    case Dtype::kHalf: {
      torch::headeronly::Half value;
      std::memcpy(&value, at.data, sizeof value);
      return value;
    }
    case Dtype::kBFloat16: {
      torch::headeronly::BFloat16 value;
      std::memcpy(&value, at.data, sizeof value);
      return value;
    }
    default: {
      float value;
      std::memcpy(&value, at.data, sizeof value);
      return value;
    }
  }
}

// (B, keys) of a bias that is the same for all heads and queries, else nothing.
inline std::vector<float> bias_of_keys(const Bias& bias, int64_t B, int64_t keys) {
  std::vector<float> values;
  if (!bias.base || bias.h != 0 || bias.l != 0) return values;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t n = 0; n < keys; ++n)
      values.push_back(value_of(bias.base + (b * bias.b + n * bias.n)));
  return values;
}

// The values of a contiguous vector.
inline std::vector<float> floats(const Tensor& vector) {
  std::vector<float> values(vector.numel());
  const Row row = row_of(vector);
  for (size_t i = 0; i < values.size(); ++i) values[i] = value_of(row + i);
  return values;
}

inline Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v,
                              const OptionalTensor& key_mask, double scale,
                              const OptionalTensor& text_k, const OptionalTensor& text_v,
                              const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                              const OptionalTensor& bias) {
  const int64_t H = q.size(2), G = k.size(2), K = q.size(3);
  Attention a{.B = q.size(0), .L = q.size(1), .H = H, .G = G, .K = K, .R = H / G, .q = rows_of(q)};
  a.image = {rows_of(k),        rows_of(v), mask_of(key_mask), k.size(1), static_cast<float>(scale),
             split_scale(scale)};
  a.bias = bias_of(bias);
  a.image.bias = bias_of_keys(a.bias, a.B, a.image.count);
  if (text_k) {
    const float plain = 1.f / std::sqrt(static_cast<float>(K));
    a.text = {rows_of(*text_k),  rows_of(*text_v), mask_of(text_mask), text_k->size(1), plain,
              split_scale(plain)};
    const Tensor gates = torch::stable::contiguous(*text_gate);
    a.gate = floats(gates);
    for (float& gate : a.gate) gate = std::tanh(gate);
  }
  return a;
}

constexpr int64_t kMaxHeadDim = 256;

struct Outputs {
  Row out;                    // (B, L, H, K)
  int8_t* error;              // the rounding error of out, or null
  float *stats, *text_stats;  // (B, G, L, R, 2)
  float* lse;                 // (B, L, H), or null
};

// What the backward is given besides, and its results; stats and e are per row and branch.
struct Gradients : Attention {
  Rows dout, out;
  const int8_t* error;  // the rounding error of out, or null
  const float *stats, *text_stats;
  const float* dlse;                 // (B, L, H), or null
  float *e, *text_e;                 // (B, G, L, R)
  Row dq, dk, dv, dtext_k, dtext_v;  // contiguous
  float* dbias;                      // (B, H, L, keys), or null
};

// A thread's float32 work memory, aligned to cache lines and kept for the next call.
class Scratch {
 public:
  float* take(int64_t count) {
    float* start = memory_.get() + used_;
    used_ += ceil_div(count, 16) * 16;
    return start;
  }
  void reserve(int64_t count) {
    used_ = 0;
    if (count <= size_) return;
    const size_t bytes = sizeof(float) * (ceil_div(count, 16) * 16);
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    STD_TORCH_CHECK(memory_ != nullptr, "out of memory: ", bytes, " bytes");
    size_ = count;
  }

 private:
  std::unique_ptr<float, decltype(&std::free)> memory_{nullptr, &std::free};
  int64_t size_ = 0, used_ = 0;
};

// Calls f(b, g, first, rows) for blocks of the `count` rows or keys of every head. A tile is packed
// once per block, so blocks are large: `size`, or fewer if threads would have no work.
template <class F>
void parallel_blocks(const Attention& a, int64_t count, int64_t size, const F& f) {
  const int64_t heads = a.B * a.G, enough = 4 * torch::stable::get_num_threads();
  while (size > 64 && heads * ceil_div(count, size) < enough) size /= 2;
  const int64_t blocks = ceil_div(count, size);
  torch::stable::parallel_for(0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * size;
      f(i / blocks / a.G, i / blocks % a.G, first, std::min(size, count - first));
    }
  });
}

using AttentionSaved = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using AttentionGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// out, its error, and the statistics of both softmaxes; the log-sum-exp, (B, L, H), goes to `lse`
// if that is not null.
AttentionSaved attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptionalTensor& key_mask, double scale,
                                 const OptionalTensor& text_k, const OptionalTensor& text_v,
                                 const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                                 const OptionalTensor& bias, bool with_error, float* lse);

// dlse, the gradient of the log-sum-exp, may be null.
AttentionGrads attention_backward(const Tensor& dout, const float* dlse, const Tensor& out,
                                  const Tensor& error, const Tensor& stats,
                                  const Tensor& text_stats, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const OptionalTensor& key_mask, double scale,
                                  const OptionalTensor& text_k, const OptionalTensor& text_v,
                                  const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                                  const OptionalTensor& bias, bool with_dbias);

}  // namespace lumina_kernels::cpu
