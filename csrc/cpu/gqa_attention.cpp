// CPU forward of gqa_attention: flash attention over blocks of rows that share the keys of one kv
// head. Only valid keys are packed into tiles, so that the arithmetic needs no mask.
#define LUMINA_FILE "cpu/gqa_attention.cpp"
#include "cpu/gqa_attention.h"

#include "cpu/lib/levels.h"

#ifdef LUMINA_LEVEL
#include "cpu/gqa_attention_tiles.h"

namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// For kRows rows: the weighted sums of values [channel][row], the largest score times
// `inner`, and the total of the weights, of which the largest is 1.
struct Sums {
  float *out, *top, *total;

  void clear(int64_t channels) {
    std::memset(out, 0, sizeof(float) * channels * kRows);
    std::memset(total, 0, sizeof(float) * kRows);
    std::fill(top, top + kRows, -INFINITY);
  }
};

struct KeyTile {
  float *k, *v, *s, *factor;
  int32_t index[kKeys];
};

// Adds the contribution of `keys` to the sums of `rows` rows from `first` on; q is packed in
// blocks.
template <class Unit>
void attend(const Attention& a, const Keys& keys, bool biased, int64_t b, int64_t g, int64_t first,
            int64_t rows, const float* q, Sums* sums, KeyTile& tile) {
  const int64_t units = units_of<Unit>(a.K), channels = round_up(a.K, kStep);
  uint64_t seen[kKeys];
  ValidKeys valid = a.valid(keys, b, first, rows);
  while (const int64_t count = valid.next(kKeys, tile.index)) {
    const int64_t padded = round_up(count, kStep);
    const auto key = [&](int64_t n) { return keys.k(b, tile.index[n], g); };
    const auto value = [&](int64_t n) { return keys.v(b, tile.index[n], g); };
    pack_rows<Unit>(tile.k, count, padded, a.K, key);
    pack_pairs<Unit>(tile.v, count, padded, a.K, value);
    for (int64_t block = 0; block * kRows < rows; ++block) {
      const Sums& sum = sums[block];
      const int64_t at = block * kRows, some = std::min(kRows, rows - at);
      if (keys.own_masks() && !rows_that_see(seen, a, b, first + at, some, tile.index, count))
        continue;
      scores<Unit>(tile.s, q + at * units, tile.k, units, padded);
      if (biased) add_bias(a, tile.s, kRows, 1, b, g, first + at, some, tile.index, count);
      if (keys.own_masks()) hide(tile.s, seen, count, -INFINITY);
      softmax<Unit>(tile.s, count, padded, biased ? kUnscaled : keys.split, sum.top, sum.total,
                    tile.factor);
      add_product<Unit>(sum.out, tile.factor, tile.s, tile.v, padded / Unit::kPer, channels);
    }
  }
}

// The largest score of a row as above, and log2 of the total of the weights, which may be NaN.
// Without a valid key they make P = 0.
void keep_stats(float* stats, const Sums& sums, int64_t row) {
  const bool any = sums.total[row] != 0.f;
  stats[0] = any ? sums.top[row] : 0.f;
  stats[1] = any ? std::log2(sums.total[row]) : INFINITY;
}

// The natural log-sum-exp of what keep_stats kept.
float logsumexp(const float* stats, float outer) {
  return stats[1] == INFINITY ? kLseFloor : (stats[0] * outer + stats[1]) * kLn2;
}

// Writes out = image / total + gate * text / total, transposed, and the statistics of both.
void finish(const Attention& a, const Outputs& outs, int64_t b, int64_t g, int64_t first,
            int64_t rows, const Sums& image, const Sums* text) {
  alignas(64) float image_factor[kRows], text_factor[kRows], line[kMaxHeadDim + kWidth];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r, at = (b * a.G + g) * a.rows() + row;
    image_factor[r] = image.total[r] > 0.f ? 1.f / image.total[r] : 0.f;
    keep_stats(outs.stats + 2 * at, image, r);
    if (outs.lse != nullptr)
      outs.lse[a.offset(b, g, row) / a.K] =
          logsumexp(outs.stats + 2 * at, a.bias.base ? kUnscaled.outer : a.image.split.outer);
    if (text == nullptr) continue;
    text_factor[r] = text->total[r] > 0.f ? a.gate[g * a.R + row % a.R] / text->total[r] : 0.f;
    keep_stats(outs.text_stats + 2 * at, *text, r);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < a.K; ++c) {
      line[c] = image.out[c * kRows + r] * image_factor[r];
      if (text) line[c] += text->out[c * kRows + r] * text_factor[r];
    }
    const int64_t at = a.offset(b, g, first + r);
    for_vectors(a.K, [&](int64_t i, int64_t count) {
      store(outs.out + at, i, load(line + i, count), count);
    });
    if (outs.error != nullptr) rounding_error(outs.error + at, outs.out + at, line, a.K);
  }
}

template <class Unit>
void forward_block(const Attention& a, const Outputs& outs, int64_t b, int64_t g, int64_t first,
                   int64_t rows) {
  static thread_local Scratch scratch;
  const int64_t units = units_of<Unit>(a.K), channels = round_up(a.K, kStep);
  const int64_t blocks = ceil_div(rows, kRows), branches = a.gate.empty() ? 1 : 2;
  scratch.reserve(blocks * kRows * (units + branches * (channels + 2)) +
                  kKeys * (units + channels) + kRows * (kKeys + 1) + 16 * (blocks * 6 + 8));
  float* q = scratch.take(blocks * kRows * units);
  KeyTile tile{scratch.take(kKeys * units), scratch.take(kKeys * channels),
               scratch.take(kKeys * kRows), scratch.take(kRows)};
  std::vector<Sums> sums(branches * blocks);
  for (Sums& sum : sums) {
    sum = {scratch.take(channels * kRows), scratch.take(kRows), scratch.take(kRows)};
    sum.clear(channels);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = first + block * kRows;
    pack_transposed<Unit>(q + block * kRows * units, std::min(kRows, rows - block * kRows), a.K,
                          [&](int64_t r) { return a.head(a.q, b, g, start + r); });
  }
  attend<Unit>(a, a.image, bool(a.bias.base), b, g, first, rows, q, sums.data(), tile);
  if (branches == 2)
    attend<Unit>(a, a.text, false, b, g, first, rows, q, sums.data() + blocks, tile);
  for (int64_t block = 0; block < blocks; ++block)
    finish(a, outs, b, g, first + block * kRows, std::min(kRows, rows - block * kRows), sums[block],
           branches == 2 ? &sums[blocks + block] : nullptr);
}

void forward(const Attention& a, const Outputs& outs, int64_t b, int64_t g, int64_t first,
             int64_t rows) {
#ifdef LUMINA_BF16_DOT
  if (a.q.base.dtype == Dtype::kBFloat16)
    return forward_block<BFloat16Unit>(a, outs, b, g, first, rows);
#endif
  forward_block<FloatUnit>(a, outs, b, g, first, rows);
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {

AttentionSaved attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptionalTensor& key_mask, double scale,
                                 const OptionalTensor& text_k, const OptionalTensor& text_v,
                                 const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                                 const OptionalTensor& bias, bool with_error, float* lse) {
  const Attention a =
      attention_of(q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate, bias);
  with_error = with_error && q.element_size() == 2;
  Tensor out = empty_as(q);
  Tensor error = with_error ? torch::stable::new_empty(q, q.sizes(), ScalarType::Char)
                            : empty(q, {0}, ScalarType::Char);
  Tensor stats = empty(q, {a.B, a.G, a.L, a.R, 2}, ScalarType::Float);
  Tensor text_stats = text_k ? empty_as(stats) : empty(q, {0}, ScalarType::Float);
  if (out.numel() == 0) return {out, error, stats, text_stats};
  const Outputs outs{row_of(out), with_error ? static_cast<int8_t*>(error.data_ptr()) : nullptr,
                     static_cast<float*>(stats.data_ptr()),
                     static_cast<float*>(text_stats.data_ptr()), lse};
  parallel_blocks(a, a.rows(), 1024, [&](int64_t b, int64_t g, int64_t first, int64_t rows) {
    LUMINA_CALL(forward, a, outs, b, g, first, rows);
  });
  return {out, error, stats, text_stats};
}

static AttentionSaved gqa_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const OptionalTensor& key_mask, double scale,
                                        const OptionalTensor& text_k, const OptionalTensor& text_v,
                                        const OptionalTensor& text_mask,
                                        const OptionalTensor& text_gate, const OptionalTensor& bias,
                                        bool with_error) {
  return attention_forward(q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate, bias,
                           with_error, nullptr);
}

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("gqa_attention_fwd", TORCH_BOX(&gqa_attention_fwd));
}

}  // namespace lumina_kernels::cpu
#endif
