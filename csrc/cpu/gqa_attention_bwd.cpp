// CPU backward of gqa_attention: one pass over blocks of rows for dq, one over blocks of keys for
// dk and dv, so that no sum is shared by threads. Per branch, with the weights P of the
// softmax and w = 1 (image) or tanh(gate) (text):
//
//   dP = dout vᵀ,  e = sum P dP = dout . (P v),  dS = w P (dP - e),
//   dq += scale dS k,  dk = scale dSᵀ q,  dv = w Pᵀ dout,  dgate = (1 - tanh²) sum e_text
//
// The text is short, so its e is summed over its keys. The image's e is dout . out - w e_text,
// corrected by the rounding error of out, which the forward kept.
#define LUMINA_FILE "cpu/gqa_attention_bwd.cpp"
#include "cpu/gqa_attention.h"
#include "cpu/lib/levels.h"

#ifdef LUMINA_LEVEL
#include "cpu/gqa_attention_tiles.h"

namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

struct KeyTileBwd {
  float *k, *v, *k_pairs, *s, *dp;
  int32_t index[kKeys];
};

// A block of kRows rows: q and dout by columns, the gradient of q, and the terms of both branches.
struct RowBlock {
  float *q, *dout, *dq;
  RowTerms image, text;
};

// Adds one branch's part to the gradients of q, or, with find_e, to e.
template <class Unit>
void rows_over_keys(const Gradients& a, const Keys& keys, bool is_text, bool find_e, int64_t b,
                    int64_t g, int64_t first, int64_t rows, RowBlock* blocks, KeyTileBwd& tile) {
  const int64_t units = units_of<Unit>(a.K), channels = round_up(a.K, kStep);
  alignas(64) float ones[kRows];
  std::fill(ones, ones + kRows, 1.f);
  const bool biased = !is_text && a.bias.base;
  uint64_t seen[kKeys];
  ValidKeys valid = a.valid(keys, b, first, rows);
  while (const int64_t count = valid.next(kKeys, tile.index)) {
    const int64_t padded = round_up(count, kStep);
    const auto key = [&](int64_t n) { return keys.k(b, tile.index[n], g); };
    pack_rows<Unit>(tile.k, count, padded, a.K, key);
    pack_rows<Unit>(tile.v, count, padded, a.K,
                    [&](int64_t n) { return keys.v(b, tile.index[n], g); });
    if (!find_e) pack_pairs<Unit>(tile.k_pairs, count, padded, a.K, key);
    for (int64_t i = 0; i * kRows < rows; ++i) {
      const RowBlock& block = blocks[i];
      const int64_t start = first + i * kRows, some = std::min(kRows, rows - i * kRows);
      if (keys.own_masks() && !rows_that_see(seen, a, b, start, some, tile.index, count)) continue;
      scores<Unit>(tile.s, block.q, tile.k, units, padded);
      scores<Unit>(tile.dp, block.dout, tile.v, units, padded);
      if (biased) add_bias(a, tile.s, kRows, 1, b, g, start, some, tile.index, count);
      if (keys.own_masks()) hide_pairs(tile.s, tile.dp, seen, count);
      const RowTerms terms = is_text ? block.text : block.image;
      float* raw = !is_text && a.dbias ? tile.dp : nullptr;
      row_gradients<Unit>(tile.s, tile.dp, count, padded, biased ? kUnscaled : keys.split, terms,
                          find_e ? terms.e : nullptr, raw);
      if (raw) store_dbias(a, raw, b, g, start, some, tile.index, count);
      if (!find_e)
        add_product<Unit>(block.dq, ones, tile.s, tile.k_pairs, padded / Unit::kPer, channels);
    }
  }
}

// Packs the `some` existing rows of a block and initialises their terms; the text's part is still
// to be subtracted from e of the image.
template <class Unit>
void begin_rows(const Gradients& a, RowBlock& block, int64_t b, int64_t g, int64_t start,
                int64_t some) {
  pack_transposed<Unit>(block.q, some, a.K,
                        [&](int64_t r) { return a.head(a.q, b, g, start + r); });
  pack_transposed<Unit>(block.dout, some, a.K,
                        [&](int64_t r) { return a.head(a.dout, b, g, start + r); });
  std::memset(block.dq, 0, sizeof(float) * kRows * round_up(a.K, kStep));
  for (int64_t r = 0; r < kRows; ++r) {
    for (const RowTerms& terms : {block.image, block.text}) {
      terms.top[r] = terms.e[r] = terms.weight[r] = 0.f;
      terms.total[r] = INFINITY;
    }
    block.image.weight[r] = a.image.scale;
  }
  for (int64_t r = 0; r < some; ++r) {
    const int64_t row = start + r, at = (b * a.G + g) * a.rows() + row;
    const int8_t* error = a.error ? a.error + a.offset(b, g, row) : nullptr;
    block.image.top[r] = a.stats[2 * at], block.image.total[r] = a.stats[2 * at + 1];
    block.image.e[r] =
        exact_product(a.head(a.dout, b, g, row), a.head(a.out, b, g, row), error, a.K);
    if (a.dlse) block.image.e[r] -= a.dlse[a.offset(b, g, row) / a.K];  // of a score it is P dlse
    if (a.gate.empty()) continue;
    block.text.top[r] = a.text_stats[2 * at], block.text.total[r] = a.text_stats[2 * at + 1];
    block.text.weight[r] = a.gate[g * a.R + row % a.R] * a.text.scale;
  }
}

// Completes and stores both e of a block's rows, once the text's is known.
void keep_e(const Gradients& a, const RowBlock& block, int64_t b, int64_t g, int64_t start,
            int64_t some) {
  for (int64_t r = 0; r < some; ++r) {
    const int64_t row = start + r, at = (b * a.G + g) * a.rows() + row;
    if (!a.gate.empty()) {
      block.image.e[r] -= a.gate[g * a.R + row % a.R] * block.text.e[r];
      a.text_e[at] = block.text.e[r];
    }
    a.e[at] = block.image.e[r];
  }
}

template <class Unit>
void row_blocks(const Gradients& a, int64_t b, int64_t g, int64_t first, int64_t rows) {
  static thread_local Scratch scratch;
  const int64_t units = units_of<Unit>(a.K), channels = round_up(a.K, kStep);
  const int64_t count = ceil_div(rows, kRows);
  scratch.reserve(count * kRows * (2 * units + channels + 8) +
                  kKeys * (2 * units + channels + 2 * kRows));
  const auto take = [&](int64_t lines) { return scratch.take(kRows * lines); };
  KeyTileBwd tile{scratch.take(kKeys * units), scratch.take(kKeys * units),
                  scratch.take(kKeys * channels), take(kKeys), take(kKeys)};
  std::vector<RowBlock> blocks(count);
  const auto each = [&](auto f) {
    for (int64_t i = 0; i < count; ++i)
      f(blocks[i], first + i * kRows, std::min(kRows, rows - i * kRows));
  };
  each([&](RowBlock& block, int64_t start, int64_t some) {
    block = {take(units),
             take(units),
             take(channels),
             {take(1), take(1), take(1), take(1)},
             {take(1), take(1), take(1), take(1)}};
    begin_rows<Unit>(a, block, b, g, start, some);
  });
  const auto over = [&](const Keys& keys, bool is_text, bool find_e) {
    rows_over_keys<Unit>(a, keys, is_text, find_e, b, g, first, rows, blocks.data(), tile);
  };
  over(a.text, true, true);
  each([&](RowBlock& block, int64_t start, int64_t some) { keep_e(a, block, b, g, start, some); });
  over(a.image, false, false);
  over(a.text, true, false);
  each([&](RowBlock& block, int64_t start, int64_t some) {
    store_transposed(block.dq, some, a.K, 1.f,
                     [&](int64_t r) { return a.dq + a.offset(b, g, start + r); });
  });
}

// A block of kRows keys: keys and values by columns, and their gradients.
struct KeyBlock {
  float *k, *v, *dk, *dv;
  const int32_t* index;
  int64_t count;
};

// A tile of rows: q and dout by rows and by pairs of rows, and their terms.
struct RowTile {
  float *q, *dout, *q_pairs, *dout_pairs, *s, *dp;
  RowTerms terms;
};

template <class Unit>
void pack_tile(const Gradients& a, RowTile& tile, bool is_text, int64_t b, int64_t g, int64_t first,
               int64_t rows, int64_t padded) {
  const auto q = [&](int64_t r) { return a.head(a.q, b, g, first + r); };
  const auto dout = [&](int64_t r) { return a.head(a.dout, b, g, first + r); };
  pack_rows<Unit>(tile.q, rows, padded, a.K, q);
  pack_rows<Unit>(tile.dout, rows, padded, a.K, dout);
  pack_pairs<Unit>(tile.q_pairs, rows, padded, a.K, q);
  pack_pairs<Unit>(tile.dout_pairs, rows, padded, a.K, dout);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (b * a.G + g) * a.rows() + first + r;
    const float* stats = (is_text ? a.text_stats : a.stats) + 2 * at;
    tile.terms.top[r] = stats[0], tile.terms.total[r] = stats[1];
    tile.terms.e[r] = is_text ? a.text_e[at] * a.text.split.inner : a.e[at] * a.image.split.inner;
    tile.terms.weight[r] = is_text ? a.gate[g * a.R + (first + r) % a.R] : 1.f;
  }
}

// Adds the contribution of a tile of rows to the gradients of a block of keys.
template <class Unit>
void add_rows(const Gradients& a, KeyBlock& block, RowTile& tile, bool is_text, int64_t b,
              int64_t g, int64_t first, int64_t rows, int64_t padded) {
  alignas(64) float ones[kRows];
  std::fill(ones, ones + kRows, 1.f);
  const int64_t units = units_of<Unit>(a.K), channels = round_up(a.K, kStep);
  const Keys& keys = is_text ? a.text : a.image;
  const bool biased = !is_text && a.bias.base;
  uint64_t seen[kKeys];
  if (keys.own_masks() && !keys_seen_by(seen, a, b, first, rows, block.index, block.count)) return;
  scores<Unit>(tile.s, block.k, tile.q, units, padded);
  scores<Unit>(tile.dp, block.v, tile.dout, units, padded);
  if (biased) add_bias(a, tile.s, 1, kRows, b, g, first, rows, block.index, block.count);
  if (keys.own_masks()) hide_pairs(tile.s, tile.dp, seen, rows);
  key_gradients<Unit>(tile.s, tile.dp, rows, padded, biased ? kUnscaled : keys.split,
                      keys.split.inner, tile.terms);
  add_product<Unit>(block.dv, ones, tile.s, tile.dout_pairs, padded / Unit::kPer, channels);
  add_product<Unit>(block.dk, ones, tile.dp, tile.q_pairs, padded / Unit::kPer, channels);
}

// The gradients of `count` valid keys of one branch, kRows at a time.
template <class Unit>
void key_blocks(const Gradients& a, bool is_text, int64_t b, int64_t g, const int32_t* index,
                int64_t count) {
  static thread_local Scratch scratch;
  const Keys& keys = is_text ? a.text : a.image;
  const int64_t units = units_of<Unit>(a.K), channels = round_up(a.K, kStep);
  std::vector<KeyBlock> blocks(ceil_div(count, kRows));
  scratch.reserve(blocks.size() * kRows * 2 * (units + channels) +
                  kKeys * (2 * units + 2 * channels + 2 * kRows + 4));
  const auto take = [&](int64_t lines) { return scratch.take(kRows * lines); };
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int32_t* own = index + i * kRows;
    blocks[i] = {take(units),    take(units), take(channels),
                 take(channels), own,         std::min<int64_t>(kRows, count - i * kRows)};
    const auto row = [&](const Rows& x) { return [&, own](int64_t n) { return x(b, own[n], g); }; };
    pack_transposed<Unit>(blocks[i].k, blocks[i].count, a.K, row(keys.k));
    pack_transposed<Unit>(blocks[i].v, blocks[i].count, a.K, row(keys.v));
    for (float* grad : {blocks[i].dk, blocks[i].dv})
      std::memset(grad, 0, sizeof(float) * kRows * channels);
  }
  const auto line = [&](int64_t width) { return scratch.take(kKeys * width); };
  RowTile tile{.q = line(units),
               .dout = line(units),
               .q_pairs = line(channels),
               .dout_pairs = line(channels),
               .s = line(kRows),
               .dp = line(kRows),
               .terms = {line(1), line(1), line(1), line(1)}};
  for (int64_t first = 0; first < a.rows(); first += kKeys) {
    const int64_t rows = std::min(kKeys, a.rows() - first), padded = round_up(rows, kStep);
    pack_tile<Unit>(a, tile, is_text, b, g, first, rows, padded);
    for (KeyBlock& block : blocks)
      add_rows<Unit>(a, block, tile, is_text, b, g, first, rows, padded);
  }
  // The sums have the other part of it already, or they might be infinite.
  const float after = keys.scale / keys.split.inner;
  for (const KeyBlock& block : blocks) {
    const auto row = [&](Row grads) {
      return [&, grads](int64_t n) {
        return grads + ((b * keys.count + block.index[n]) * a.G + g) * a.K;
      };
    };
    store_transposed(block.dk, block.count, a.K, after, row(is_text ? a.dtext_k : a.dk));
    store_transposed(block.dv, block.count, a.K, 1.f, row(is_text ? a.dtext_v : a.dv));
  }
}

void rows_backward(const Gradients& a, int64_t b, int64_t g, int64_t first, int64_t rows) {
#ifdef LUMINA_BF16_DOT
  if (a.q.base.dtype == Dtype::kBFloat16) return row_blocks<BFloat16Unit>(a, b, g, first, rows);
#endif
  row_blocks<FloatUnit>(a, b, g, first, rows);
}

void keys_backward(const Gradients& a, bool is_text, int64_t b, int64_t g, const int32_t* index,
                   int64_t count) {
#ifdef LUMINA_BF16_DOT
  if (a.q.base.dtype == Dtype::kBFloat16)
    return key_blocks<BFloat16Unit>(a, is_text, b, g, index, count);
#endif
  key_blocks<FloatUnit>(a, is_text, b, g, index, count);
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

float* data_of(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

void keys_backward(const Gradients& a, bool is_text) {
  const Keys& keys = is_text ? a.text : a.image;
  std::vector<std::vector<int32_t> > valid(a.B, std::vector<int32_t>(keys.count));
  for (int64_t b = 0; b < a.B; ++b)
    valid[b].resize(a.valid(keys, b, 0, a.rows()).next(keys.count, valid[b].data()));
  parallel_blocks(a, keys.count, 256, [&](int64_t b, int64_t g, int64_t first, int64_t count) {
    count = std::min<int64_t>(count, static_cast<int64_t>(valid[b].size()) - first);
    if (count > 0) LUMINA_CALL(keys_backward, a, is_text, b, g, valid[b].data() + first, count);
  });
}

// (1 - tanh²) times the sum of e over all rows of a head.
Tensor gate_gradient(const Gradients& a, const Tensor& gate) {
  Tensor grad = empty(gate, {a.H}, ScalarType::Float);
  for (int64_t h = 0; h < a.H; ++h) {
    double total = 0;
    for (int64_t b = 0; b < a.B; ++b)
      for (int64_t l = 0; l < a.L; ++l)
        total += a.text_e[((b * a.G + h / a.R) * a.L + l) * a.R + h % a.R];
    data_of(grad)[h] = static_cast<float>((1 - a.gate[h] * a.gate[h]) * total);
  }
  return torch::stable::to(grad, gate.scalar_type());
}

}  // namespace

AttentionGrads attention_backward(const Tensor& dout, const float* dlse, const Tensor& out,
                                  const Tensor& error, const Tensor& stats,
                                  const Tensor& text_stats, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const OptionalTensor& key_mask, double scale,
                                  const OptionalTensor& text_k, const OptionalTensor& text_v,
                                  const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                                  const OptionalTensor& bias, bool with_dbias) {
  Gradients a{attention_of(q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate, bias)};
  const auto zeros = [&](const OptionalTensor& x) { return x ? zeros_as(*x) : nothing(q); };
  Tensor dq = empty_as(q), dk = zeros(k), dv = zeros(v);
  Tensor dtext_k = zeros(text_k), dtext_v = zeros(text_v), dgate = zeros(text_gate);
  const int64_t shape[] = {a.B, a.H, a.L, a.image.count};
  Tensor dbias =
      with_dbias ? torch::stable::new_zeros(q, {shape, 4}, ScalarType::Float) : nothing(q);
  if (dq.numel() > 0) {
    const Tensor e = empty(q, {a.B, a.G, a.L, a.R}, ScalarType::Float);
    const Tensor text_e = text_k ? empty_as(e) : nothing(q);
    a.dout = rows_of(dout), a.out = rows_of(out);
    a.error = error.numel() > 0 ? static_cast<const int8_t*>(error.data_ptr()) : nullptr;
    a.dlse = dlse;
    a.stats = data_of(stats), a.text_stats = data_of(text_stats);
    a.e = data_of(e), a.text_e = data_of(text_e);
    a.dq = row_of(dq), a.dk = row_of(dk), a.dv = row_of(dv);
    a.dtext_k = row_of(dtext_k), a.dtext_v = row_of(dtext_v);
    a.dbias = with_dbias ? data_of(dbias) : nullptr;
    parallel_blocks(a, a.rows(), 256, [&](int64_t b, int64_t g, int64_t first, int64_t rows) {
      LUMINA_CALL(rows_backward, a, b, g, first, rows);
    });
    if (a.image.count > 0) keys_backward(a, false);
    if (a.text.count > 0) keys_backward(a, true);
    if (text_gate) dgate = gate_gradient(a, *text_gate);
  }
  if (with_dbias) dbias = sum_to(dbias, *bias);
  return {dq, dk, dv, dtext_k, dtext_v, dgate, dbias};
}

static AttentionGrads gqa_attention_bwd(const Tensor& dout, const Tensor& out, const Tensor& error,
                                        const Tensor& stats, const Tensor& text_stats,
                                        const Tensor& q, const Tensor& k, const Tensor& v,
                                        const OptionalTensor& key_mask, double scale,
                                        const OptionalTensor& text_k, const OptionalTensor& text_v,
                                        const OptionalTensor& text_mask,
                                        const OptionalTensor& text_gate, const OptionalTensor& bias,
                                        bool with_dbias) {
  return attention_backward(dout, nullptr, out, error, stats, text_stats, q, k, v, key_mask, scale,
                            text_k, text_v, text_mask, text_gate, bias, with_dbias);
}

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("gqa_attention_bwd", TORCH_BOX(&gqa_attention_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
