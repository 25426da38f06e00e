// CUDA launcher of gqa_attention's forward over parts of the keys.
#include "cuda/gqa_attention_launch.h"
#include "cuda/gqa_attention_split.cuh"
#include "cuda/gqa_attention_split.h"

namespace lumina_kernels::cuda {
namespace {

template <int kHeadDim>
bool launch(const Tensor& q, const Tensor& out, const AttentionFwdParams<uint16_t>& fwd) {
  using Tile = AttentionTile<kHeadDim, false>;
  const int64_t B = q.size(0), heads = B * fwd.G, row_blocks = ceil_div(fwd.rows, Tile::kRows);
  const int tiles = static_cast<int>(ceil_div(fwd.keys[0].count, Tile::kKeys));
  const int text_tiles = static_cast<int>(ceil_div(fwd.text ? fwd.keys[1].count : 0, Tile::kKeys));
  const AttentionGrid grid{.blocks = heads * row_blocks,
                           .tiles = tiles,
                           .text_tiles = text_tiles,
                           .tile_time = attention_tile_time<kHeadDim>(),
                           .sums = 4.0 * Tile::kRows * kHeadDim,
                           .processors = processors_of(q)};
  int parts = attention_parts(grid);
  if (parts == 1) return false;
  const int64_t part_tiles = ceil_div(tiles, parts);
  parts = static_cast<int>(ceil_div(tiles, part_tiles));
  const int64_t pieces = parts + (fwd.text ? 1 : 0), rows = heads * fwd.rows;
  const Tensor sums = empty(q, {pieces, rows, kHeadDim}, ScalarType::Float);
  const Tensor stats = empty(q, {pieces, rows, 2}, ScalarType::Float);
  AttentionSplitParams p{.fwd = fwd,
                         .sums = pointer_to<float>(sums),
                         .stats = pointer_to<float>(stats),
                         .rows = rows,
                         .parts = parts,
                         .part_keys = static_cast<int>(part_tiles * Tile::kKeys)};
  p.fwd.row_blocks = static_cast<int>(row_blocks);
  LaunchConfig config = gqa_attention_config<kHeadDim, false>(heads, fwd.rows, false);
  config.grid.y = static_cast<unsigned>(pieces);
  if (dtype_of(q) == Dtype::kHalf) {
    LUMINA_LAUNCH(q, config, (gqa_attention_split_kernel<kHeadDim, Dtype::kHalf>), p);
  } else {
    LUMINA_LAUNCH(q, config, (gqa_attention_split_kernel<kHeadDim, Dtype::kBFloat16>), p);
  }
  const AttentionCombineParams combine{.sums = values_of(sums),
                                       .parts = pointer_to<const float>(stats),
                                       .out = values_of(out),
                                       .gate = fwd.gate,
                                       .error = fwd.error,
                                       .stats = fwd.stats,
                                       .text_stats = fwd.text_stats,
                                       .outer = fwd.keys[0].split.outer,
                                       .rows = rows,
                                       .count = parts,
                                       .width = kHeadDim,
                                       .K = fwd.K,
                                       .L = fwd.L,
                                       .G = fwd.G,
                                       .R = fwd.R};
  LUMINA_LAUNCH(q, gqa_attention_combine_config(rows, fwd.K), gqa_attention_combine_kernel,
                combine);
  return true;
}

}  // namespace

bool gqa_attention_split_fwd(const Tensor& q, const Tensor& out,
                             const AttentionFwdParams<uint16_t>& p) {
  bool done = false;
  with_size(p.K, AttentionHeadDims(), [&](auto size) { done = launch<size()>(q, out, p); });
  return done;
}

}  // namespace lumina_kernels::cuda
