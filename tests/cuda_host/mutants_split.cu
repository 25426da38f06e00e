// The forward over parts of the keys.
#include "cuda/gqa_attention_split.cuh"
#include "mutants.h"

namespace lumina_kernels::cuda {
namespace {

void compute(const Problem& x) {
  using Tile = AttentionTile<72, false>;
  constexpr int kPartTiles = 2;
  const int parts = (x.L_kv + kPartTiles * Tile::kKeys - 1) / (kPartTiles * Tile::kKeys);
  std::vector<float> sums((parts + 1) * x.rows() * 72), stats(2 * (parts + 1) * x.rows());
  AttentionSplitParams p{.fwd = forward_params(x),
                         .sums = pointer(sums.data(), sums.size()),
                         .stats = pointer(stats.data(), stats.size()),
                         .rows = x.rows(),
                         .parts = parts,
                         .part_keys = kPartTiles * Tile::kKeys};
  p.fwd.row_blocks = (p.fwd.rows + Tile::kRows - 1) / Tile::kRows;
  LaunchConfig config = gqa_attention_config<72, false>(x.B * x.G, p.fwd.rows, false);
  config.grid.y = parts + 1;
  run("split", config, gqa_attention_split_kernel<72, Dtype::kBFloat16>, p);
  const AttentionCombineParams combine{.sums = values(sums.data(), sums.size(), Dtype::kFloat),
                                       .parts = p.stats,
                                       .out = values(x.out, x.rows() * x.K, Dtype::kBFloat16),
                                       .gate = p.fwd.gate,
                                       .error = p.fwd.error,
                                       .stats = p.fwd.stats,
                                       .text_stats = p.fwd.text_stats,
                                       .outer = p.fwd.keys[0].split.outer,
                                       .rows = x.rows(),
                                       .count = parts,
                                       .width = 72,
                                       .K = x.K,
                                       .L = x.L,
                                       .G = x.G,
                                       .R = x.H / x.G};
  run("combine", gqa_attention_combine_config(x.rows(), x.K), gqa_attention_combine_kernel,
      combine);
}

}  // namespace
}  // namespace lumina_kernels::cuda

const char* mutant(const lumina_kernels::cuda::Problem* problem) {
  return lumina_kernels::cuda::outcome_of([&] { lumina_kernels::cuda::compute(*problem); });
}
