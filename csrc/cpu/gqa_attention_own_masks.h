// Masks that every token has of its own, in CPU attention. Included once per level, after the
// tiles.
//
// A tile of scores has lines of kRows columns: a line is a key and columns are rows of q, or the
// other way round. Which pairs are valid is a word for each line, with a bit for each column.
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

static_assert(kRows == 64, "a word has 64 bits");

// A token's mask of some keys, as bytes of 0 or 1.
inline void read_bits(uint8_t* line, const KeyMask& mask, int64_t b, int64_t l, const int32_t* keys,
                      int64_t count) {
  const uint8_t* bits = mask.of(b, l);
  if (mask.n == 1 && keys[count - 1] - keys[0] == count - 1) {  // they follow each other
    std::memcpy(line, bits + keys[0], count);
  } else {
    for (int64_t n = 0; n < count; ++n) line[n] = bits[keys[n] * mask.n];
  }
}

// The words of keys: which of `rows` rows from `first` on see them. False if no row sees any.
inline bool rows_that_see(uint64_t* words, const Attention& a, int64_t b, int64_t first,
                          int64_t rows, const int32_t* keys, int64_t count) {
  std::fill(words, words + count, 0);
  uint8_t line[kKeys];
  for (int64_t r = 0, end; r < rows; r = end) {
    const int64_t l = (first + r) / a.R;
    end = std::min(rows, (l + 1) * a.R - first);
    const uint64_t own = ~uint64_t{0} >> (kRows - (end - r)) << r;
    read_bits(line, a.text.mask, b, l, keys, count);
    for (int64_t n = 0; n < count; ++n) words[n] |= own & -uint64_t{line[n]};
  }
  return std::any_of(words, words + count, [](uint64_t word) { return word != 0; });
}

// The words of rows: which of `count` keys they see.
inline bool keys_seen_by(uint64_t* words, const Attention& a, int64_t b, int64_t first,
                         int64_t rows, const int32_t* keys, int64_t count) {
  uint64_t any = 0;
  uint8_t line[kRows] = {};
  for (int64_t r = 0, end; r < rows; r = end) {
    const int64_t l = (first + r) / a.R;
    end = std::min(rows, (l + 1) * a.R - first);
    read_bits(line, a.text.mask, b, l, keys, count);
    uint64_t word = 0;
    for (int64_t n = 0; n < kRows; n += 8) {
      uint64_t bytes;  // eight bytes of 0 or 1 become eight bits
      std::memcpy(&bytes, line + n, 8);
      word |= (bytes * 0x0102040810204080 >> 56) << n;
    }
    std::fill(words + r, words + end, word);
    any |= word;
  }
  return any != 0;
}

// Replaces what belongs to pairs that are not valid.
inline void hide(float* tile, const uint64_t* words, int64_t lines, float value) {
  IntVec lane;
  for (int64_t i = 0; i < kWidth; ++i) lane[i] = 1 << i;
  for (int64_t i = 0; i < lines; ++i) {
    if (words[i] == ~uint64_t{0}) continue;
    for (int64_t j = 0; j < kRows; j += kWidth) {
      const IntVec bits = static_cast<int32_t>(words[i] >> j) & lane;
      float* at = tile + i * kRows + j;
      store(at, bits == 0 ? broadcast(value) : load(at));
    }
  }
}

// The same for scores and what their weights are multiplied by, which may be infinite.
inline void hide_pairs(float* s, float* dp, const uint64_t* words, int64_t lines) {
  hide(s, words, lines, -INFINITY);
  hide(dp, words, lines, 0.f);
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
