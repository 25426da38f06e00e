// gqa_attention's forward where it has few query rows for many keys: blocks take parts of the keys,
// and a second kernel adds up what they found. The text is a part of its own.
#pragma once

#include "cuda/gqa_attention.cuh"
#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

// How long a block walks over a branch's tiles, in microseconds: one that has a processor for
// itself reaches half of the tensor cores' 1024 multiply-adds a cycle, at about 1.7 GHz.
template <int kHeadDim>
constexpr double attention_tile_time() {
  using Tile = AttentionTile<kHeadDim, false>;
  return 2.0 * Tile::kRows * Tile::kKeys * (2 * kHeadDim) / (1024 * 1700);
}

// A grid of kernel gqa_attention_fwd_kernel that leaves processors without work.
struct AttentionGrid {
  int64_t blocks;
  int tiles, text_tiles;  // of keys; what a block walks over
  double tile_time;
  double sums;  // bytes of a block's weighted sums
  int processors;
};

// What a grid takes with the keys in `parts`, in microseconds; with 1 as it is. Nobody has measured
// it: a launch, and what a block does before its first tile and after its last one, take 2; two
// blocks on a processor are 4/3 as fast as one after the other; sums move at 2 TB/s.
inline double attention_time(const AttentionGrid& grid, int parts) {
  constexpr double kBlockTime = 2, kTogether = 0.75, kBytes = 2e6;
  const int64_t pieces = parts == 1 ? 1 : parts + (grid.text_tiles > 0);
  const int64_t most = ceil_div(grid.blocks * pieces, grid.processors);  // blocks on a processor
  const int64_t tiles = parts == 1
                            ? grid.tiles + grid.text_tiles
                            : std::max<int64_t>(ceil_div(grid.tiles, parts), grid.text_tiles);
  const double blocks = most == 1 ? 1 : kTogether * static_cast<double>(most);
  const double time = blocks * (static_cast<double>(tiles) * grid.tile_time + kBlockTime);
  if (parts == 1) return time;
  return time + 2 * kBlockTime + 2 * static_cast<double>(grid.blocks * pieces) * grid.sums / kBytes;
}

// The number of parts to take the keys in; 1 where others win less than a fifth, which the estimate
// may well be wrong by.
inline int attention_parts(const AttentionGrid& grid) {
  constexpr int kMost = 16;
  if (grid.blocks > grid.processors) return 1;
  const double whole = attention_time(grid, 1);
  double least = whole / 1.2;
  int best = 1;
  for (int parts = 2; parts <= std::min(grid.tiles, kMost); ++parts) {
    const double time = attention_time(grid, parts);
    if (time < least) least = time, best = parts;
  }
  return best;
}

struct AttentionSplitParams {
  AttentionFwdParams<uint16_t> fwd;
  Global<float> sums;    // of weighted values, (parts, B, L, H, the kernel's head_dim)
  Global<float> stats;   // (parts, B, G, L, R, 2): the largest score and the total of the weights
  int64_t rows;          // B * L * H
  int parts, part_keys;  // of the image; the text is the last part, beyond these
};

// As gqa_attention_fwd_kernel, for one part of the keys; sums stay undivided.
template <int kHeadDim, Dtype kDtype>
__global__ void __launch_bounds__(kAttentionThreads, AttentionTile<kHeadDim, false>::kBlocks)
    gqa_attention_split_kernel(const LUMINA_GRID_CONSTANT AttentionSplitParams p) {
  using Tile = AttentionTile<kHeadDim, false>;
  LUMINA_DYNAMIC_SHARED(uint16_t, tiles);
  const AttentionPlace<uint16_t> at(p.fwd, Tile::kRows);
  AttentionWarp<kHeadDim, kDtype, false> warp;
  const auto first_row = [&] { return at.first_row + thread_index() / 32 * Tile::kWarpRows; };
  warp.load_queries(at, first_row(), tiles + thread_index() / 32 * Tile::kRowElements);
  const int part = static_cast<int>(blockIdx.y), branch = part == p.parts ? 1 : 0;
  const AttentionKeys<uint16_t>& keys = p.fwd.keys[branch];
  if (keys.scale < 0.0f) warp.negate_queries();
  warp.clear();
  const auto copy = [&](int stage, int first) {
    const Shared<uint16_t> to = tiles + 2 * stage * Tile::kElements;
    copy_keys<Tile>(to, at.keys(keys.k), keys.k.step_l, first, keys.count, p.fwd.K, keys.vectors);
    copy_keys<Tile>(to + Tile::kElements, at.keys(keys.v), keys.v.step_l, first, keys.count,
                    p.fwd.K, keys.vectors);
    copy_async_commit();
  };
  const int start = branch == 0 ? part * p.part_keys : 0;
  const int end = branch == 0 ? min(start + p.part_keys, keys.count) : keys.count;
  KeyRangeWalk<Tile::kKeys> walk(keys, at.b, start, end);
  bool more = walk.next(keys, at.b);
  __syncthreads();  // queries are read
  if (more) copy(0, walk.first);
  for (int stage = 0; more; stage ^= 1) {
    const uint64_t bits = walk.bits;
    copy_async_wait<0>();
    __syncthreads();
    more = walk.next(keys, at.b);
    if (more) copy(stage ^ 1, walk.first);
    if (first_row() >= p.fwd.rows) continue;
    const Shared<uint16_t> tile = tiles + 2 * stage * Tile::kElements;
    warp.multiply_keys(tile);
    if (bits != walk.kFull) warp.mask(bits);
    warp.exponentials({fabsf(keys.split.inner), keys.split.outer});
    warp.multiply_values(tile + Tile::kElements);
  }
  const int lane = lane_index();
#pragma unroll
  for (int m = 0; m < warp.kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      RowSoftmax& softmax = warp.softmax[m][i];
      softmax.total += __shfl_xor_sync(kAllLanes, softmax.total, 1);
      softmax.total += __shfl_xor_sync(kAllLanes, softmax.total, 2);
      const int row = first_row() + 16 * m + 8 * i + lane / 4;
      if (row >= p.fwd.rows) continue;
      const int64_t before = part * p.rows;
      if (lane % 4 == 0) {
        store_global(p.stats + 2 * (before + at.sum(row)), make_float2(softmax.top, softmax.total));
      }
      const Global<float> to = p.sums + ((before + at.out(row)) * kHeadDim + lane % 4 * 2);
#pragma unroll
      for (int n = 0; n < warp.kOutTiles; ++n) {
        store_global(to + 8 * n, make_float2(warp.out[m][n][2 * i], warp.out[m][n][2 * i + 1]));
      }
    }
  }
}

constexpr int kCombineThreads = 128;

struct AttentionCombineParams {
  Values sums;                      // as above, with rows of `width` numbers
  Global<const float> parts;        // their statistics
  Values out, gate;                 // (B, L, H, K), (H,)
  Global<uint8_t> error;            // the rounding error of out, or null
  Global<float> stats, text_stats;  // (B, G, L, R, 2), the text's null without it
  float outer;                      // of the scale's split
  int64_t rows;                     // B * L * H
  int count, width, K, L, G, R;     // count of the image's parts
};

inline LaunchConfig gqa_attention_combine_config(int64_t rows, int K) {
  const int64_t blocks = ceil_div(rows * ceil_div(K, 8), kCombineThreads);
  return {dim3(static_cast<unsigned>(blocks)), dim3(kCombineThreads)};
}

// out = (sum of the parts' sums, by their largest scores) / total + tanh(gate) * (the text's sum /
// total), and what the forward keeps of a row. A thread has 8 columns of a row. The order of the
// parts is that of the keys, so nothing depends on which block was first.
__global__ void __launch_bounds__(kCombineThreads)
    gqa_attention_combine_kernel(const AttentionCombineParams p) {
  const int chunks = (p.K + 7) / 8;
  const int64_t i = int64_t{block_index()} * kCombineThreads + thread_index();
  const int64_t row = divide(i, chunks);
  if (row >= p.rows) return;
  const int column = static_cast<int>(i - row * chunks) * 8, left = p.K - column;
  const int64_t group = divide(row, p.R), token = divide(group, p.G), b = divide(token, p.L);
  const int64_t head = b * p.G + (group - token * p.G);
  const int64_t at = (head * p.L + (token - b * p.L)) * p.R + (row - group * p.R);
  const auto kept = [&](int part) {
    return load_global<float2>(p.parts + 2 * (part * p.rows + at));
  };
  const auto sum = [&](int part) {
    return load8(p.sums, (part * p.rows + row) * p.width + column, 8);
  };
  RowSoftmax all;
  for (int part = 0; part < p.count; ++part) all.top = fmaxf(all.top, kept(part).x);
  Float8 out = by_column([](int) { return 0.0f; });
  for (int part = 0; part < p.count; ++part) {
    const float2 own = kept(part);
    const float weight = exp2_approx((own.x - all.shift()) * p.outer);
    all.total += weight * own.y;
    out += weight * sum(part);
  }
  out *= all.factor(1.0f);
  if (column == 0) all.keep(p.stats + 2 * at);
  if (p.text_stats != nullptr) {
    const float2 own = kept(p.count);
    RowSoftmax text{own.x, own.y};
    const float gate = tanhf(load1(p.gate, row - token * (p.G * p.R)));
    out += text.factor(gate) * sum(p.count);
    if (column == 0) text.keep(p.text_stats + 2 * at);
  }
  store8(p.out, row * p.K + column, left, out);
  if (p.error == nullptr) return;
  uint32_t errors[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    float rounded, none;
    unpack2(pack2(out[k], 0.0f, p.out.dtype), p.out.dtype, rounded, none);
    errors[k / 4] |= rounding_error(out[k], rounded, p.out.dtype) << k % 4 * 8;
  }
  const Global<uint8_t> to = p.error + (row * p.K + column);
  if (p.K % 8 == 0) return store_global(to, make_uint2(errors[0], errors[1]));
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (k < left) to[k] = static_cast<uint8_t>(errors[k / 4] >> k % 4 * 8);
  }
}

}  // namespace lumina_kernels::cuda
