// Rows in chunks, and sums over rows that are the same bit for bit with any number of threads.
#pragma once

#include "cpu/lib/rows.h"

namespace lumina_kernels::cpu {

// Some rows of one sample. They share that sample's parameters, which are converted to float32
// once.
struct Chunk {
  int64_t b, index, first, end;

  // Whether row l has other parameters than the row before it.
  bool changes_at(int64_t l, bool per_token) const { return per_token || l == first; }
};

// All rows in chunks. The division depends on the shape alone, and therefore so do sums over a
// chunk.
struct Chunks {
  int64_t B, L, D;
  int64_t width;        // D rounded up to whole vectors of any level
  int64_t rows, count;  // rows of a chunk, chunks of a sample

  explicit Chunks(const Tensor& x) : B(x.size(0)), L(x.size(1)), D(x.size(2)) {
    constexpr int64_t kValues = 32768;
    width = (D + 15) / 16 * 16;
    rows = std::min(L, std::max<int64_t>(1, kValues / D));
    count = ceil_div(L, rows);
  }
};

// Calls f(chunk, scratch) for all chunks. Every thread has its own scratch: `buffers` rows of
// `width` values, 0 beyond D.
template <class F>
void parallel_chunks(const Chunks& chunks, int64_t buffers, const F& f) {
  constexpr int64_t kValuesPerTask = 16384;  // less is finished before another thread wakes up
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / (chunks.rows * chunks.D));
  const int64_t total = chunks.B * chunks.count;
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(buffers * chunks.width + 16);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    float* scratch = memory.data() + (64 - address % 64) % 64 / sizeof(float);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = i % chunks.count, first = index * chunks.rows;
      f(Chunk{i / chunks.count, index, first, std::min(first + chunks.rows, chunks.L)}, scratch);
    }
  });
}

// Calls f(first, end) for blocks of columns; a column takes about `work` values.
template <class F>
void parallel_columns(int64_t D, int64_t work, const F& f) {
  constexpr int64_t kColumns = 64;
  parallel_rows(ceil_div(D, kColumns), kColumns * work,
                [&](int64_t i) { f(i * kColumns, std::min((i + 1) * kColumns, D)); });
}

inline float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// Sums over the rows of each chunk, float32: the first stage of a sum over all rows.
struct Partials {
  Tensor owner;
  float* data;
  int64_t B, chunks, sums, width;

  Partials(const Tensor& like, const Chunks& c, int64_t sums_)
      : owner(empty(like, {c.B, c.count, sums_, c.width}, ScalarType::Float)),
        data(floats_of(owner)),
        B(c.B),
        chunks(c.count),
        sums(sums_),
        width(c.width) {}

  float* operator()(int64_t b, int64_t chunk, int64_t sum) const {
    return data + ((b * chunks + chunk) * sums + sum) * width;
  }
  int64_t work() const { return B * chunks * sums; }
};

}  // namespace lumina_kernels::cpu
