// What the backward kernels of gqa_attention on tensor cores share. A warp owns rows of two
// tensors, q and dout or k and v, and walks over those of the other two, 16 at a time: the products
// of its rows with them are the scores and dP, whose gradients times the walked rows add up to its
// own.
#pragma once

#include "cuda/gqa_attention_bwd.cuh"
#include "cuda/gqa_attention_mma.cuh"

namespace lumina_kernels::cuda {

// The head_dims with kernels of their own; others take the next larger one, padded with zeros. With
// a bias or with masks of tokens' own the kernels have fewer.
using AttentionBwdHeadDims = std::integer_sequence<int, 24, 32, 48, 64, 72, 80, 96, 112, 128, 256>;
using AttentionExtraHeadDims = std::integer_sequence<int, 32, 80, 128, 256>;

// The fraction of the tensor cores' multiply-adds at head_dim K that are not padding, as in the
// forward: 4 products sum over K, 3 yield K columns. 0.940 at 72.
constexpr double attention_bwd_useful_fraction(int K) {
  const int size = attention_size(K, AttentionBwdHeadDims());
  return 7.0 * K / static_cast<double>(64 * ceil_div(size, 16) + 3 * size);
}

constexpr int kWalkRows = 16;

// Where a lane's addresses start in 16 rows, for every ldmatrix of them: it is computed once.
// Matrices: 8 rows and the next 8, columns 0 to 7; columns 8 to 15. An x2 has the first two.
template <class Tile>
__device__ __forceinline__ int lane_start() {
  return lane_index() % 16 * Tile::kStep + lane_index() / 16 * 8;
}

// A warp's rows as the left factor of products, a[m][k] being rows 16 m and columns 16 k on: in
// registers, or with kKept false in shared memory, from where every product loads them again.
template <class Tile, bool kKept>
struct LeftRows {
  static constexpr int kTiles = kKept ? Tile::kRowTiles : 1, kSteps = kKept ? Tile::kSteps : 1;

  Shared<uint16_t> rows;
  uint32_t kept[kTiles][kSteps][4], kept_tail[kTiles][2];

  __device__ __forceinline__ void begin(Shared<uint16_t> from) {
    rows = from + lane_start<Tile>();
    if constexpr (kKept) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) load(m, k, kept[m][k]);
        if constexpr (Tile::kTail) load_tail(m, kept_tail[m]);
      }
    }
  }
  __device__ __forceinline__ void get(int m, int k, uint32_t (&a)[4]) const {
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept[m][k][i];
    } else {
      load(m, k, a);
    }
  }
  __device__ __forceinline__ void get_tail(int m, uint32_t (&a)[2]) const {
    if constexpr (kKept) {
      a[0] = kept_tail[m][0], a[1] = kept_tail[m][1];
    } else {
      load_tail(m, a);
    }
  }

 private:
  __device__ __forceinline__ void load(int m, int k, uint32_t (&a)[4]) const {
    ldmatrix_x4(a, rows + 16 * m * Tile::kStep + 16 * k);
  }
  __device__ __forceinline__ void load_tail(int m, uint32_t (&a)[2]) const {
    ldmatrix_x2(a, rows + 16 * m * Tile::kStep + 16 * Tile::kSteps);
  }
};

// The products of a warp's rows with 16 walked ones, as fragments: with i = 0, 1, [m][n][2 * i + e]
// is that of row 16 m + 8 i + lane / 4 and walked row 8 n + 2 * (lane % 4) + e.
template <class Tile>
struct Products {
  float of[Tile::kRowTiles][2][4];
};

// a bᵀ, b being 16 walked rows, from this lane's start on.
template <Dtype kDtype, class Tile, bool kKept>
__device__ __forceinline__ void multiply(Products<Tile>& products, const LeftRows<Tile, kKept>& a,
                                         Shared<uint16_t> walked) {
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products.of[m][0][i] = products.of[m][1][i] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < Tile::kSteps; ++k) {
    uint32_t b[4];
    ldmatrix_x4(b, walked + 16 * k);
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      uint32_t left[4];
      a.get(m, k, left);
      mma_k16<kDtype>(products.of[m][0], left, {b[0], b[2]});
      mma_k16<kDtype>(products.of[m][1], left, {b[1], b[3]});
    }
  }
  if constexpr (Tile::kTail) {
    uint32_t b[2];
    ldmatrix_x2(b, walked + 16 * Tile::kSteps);
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      uint32_t left[2];
      a.get_tail(m, left);
      mma_k8<kDtype>(products.of[m][0], left, {b[0]});
      mma_k8<kDtype>(products.of[m][1], left, {b[1]});
    }
  }
}

// sums += products times the walked rows, from this lane's start on.
template <Dtype kDtype, class Tile>
__device__ __forceinline__ void add_product(float (&sums)[Tile::kRowTiles][Tile::kOutTiles][4],
                                            const Products<Tile>& products,
                                            Shared<uint16_t> walked) {
  // Fragments of products have the layout of those of A already.
  uint32_t a[Tile::kRowTiles][4];
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = products.of[m][i / 2];
      a[m][i] = pack2(pair[i % 2 * 2], pair[i % 2 * 2 + 1], kDtype);
    }
  }
  constexpr int kPairs = Tile::kOutTiles / 2 * 2;
#pragma unroll
  for (int n = 0; n < kPairs; n += 2) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, walked + 8 * n);
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      mma_k16<kDtype>(sums[m][n], a[m], {b[0], b[1]});
      mma_k16<kDtype>(sums[m][n + 1], a[m], {b[2], b[3]});
    }
  }
  if constexpr (kPairs < Tile::kOutTiles) {
    uint32_t b[2];
    ldmatrix_x2_trans(b, walked + 8 * kPairs);
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) mma_k16<kDtype>(sums[m][kPairs], a[m], b);
  }
}

// f(a warp's row, a walked row, number of the product) for the products that this thread has.
template <class Tile, class F>
__device__ __forceinline__ void for_products(Products<Tile>& x, F f) {
  const int lane = lane_index();
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          f(16 * m + 8 * i + lane / 4, 8 * n + lane % 4 * 2 + e, x.of[m][n][2 * i + e]);
        }
      }
    }
  }
}

template <int kTiles, int kOutTiles>
__device__ __forceinline__ void clear(float (&sums)[kTiles][kOutTiles][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
}

template <int kTiles, int kOutTiles>
__device__ __forceinline__ void scale_by(float (&sums)[kTiles][kOutTiles][4], float factor) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] *= factor;
    }
  }
}

// Stores `columns` of a warp's sums, row r at to + place(r) unless that is negative. They pass
// through shared memory of the warp, so as to be stored as whole rows.
template <class Tile, Dtype kDtype, class Place>
__device__ __forceinline__ void store_sums(const float (&sums)[Tile::kRowTiles][Tile::kOutTiles][4],
                                           Shared<uint16_t> rows, Global<uint16_t> to, int columns,
                                           bool chunks, Place place) {
  const int lane = lane_index();
  __syncwarp();  // what was there is read
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int start = (16 * m + 8 * i + lane / 4) * Tile::kStep + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Tile::kOutTiles; ++n) {
        const float (&four)[4] = sums[m][n];
        store_shared(rows + start + 8 * n, pack2(four[2 * i], four[2 * i + 1], kDtype));
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < Tile::kWarpRows * Tile::kOutTiles; i += 32) {
    const int row = i / Tile::kOutTiles, column = i % Tile::kOutTiles * 8;
    const int64_t at = place(row);
    if (at < 0 || column >= columns) continue;
    const int from = row * Tile::kStep + column;
    if (chunks) {
      store_global(to + (at + column), load_shared<uint4>(rows + from));
      continue;
    }
    for (int e = 0; e < min(8, columns - column); ++e) to[at + column + e] = rows[from + e];
  }
}

}  // namespace lumina_kernels::cuda
