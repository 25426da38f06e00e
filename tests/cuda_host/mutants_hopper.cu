// The forward for Hopper.
#include "cuda/gqa_attention_hopper.cuh"
#include "mutants.h"

namespace lumina_kernels::cuda {
namespace {

using Tile = HopperTile<72>;

// As gqa_attention_hopper.cu has it.
TensorMap map_of(const AttentionHeads<uint16_t>& x, const Problem& given, int count, int columns) {
  TensorMap map{x.data.raw(), x.data.begin(), x.data.end()};
  const uint64_t sizes[] = {static_cast<uint64_t>(given.K), static_cast<uint64_t>(count),
                            static_cast<uint64_t>(given.G), static_cast<uint64_t>(given.B)};
  const uint64_t steps[] = {2ull * x.step_l, 2ull * x.step_h, 2ull * x.step_b};
  const uint32_t box[] = {static_cast<uint32_t>(columns), Tile::kKeys, 1, 1};
  std::copy(sizes, sizes + 4, map.sizes);
  std::copy(steps, steps + 3, map.steps);
  std::copy(box, box + 4, map.box);
  map.swizzle = 2 * columns;
  return map;
}

}  // namespace
}  // namespace lumina_kernels::cuda

const char* mutant(const lumina_kernels::cuda::Problem* problem) {
  using namespace lumina_kernels::cuda;
  using lumina_kernels::Dtype;
  const Problem& x = *problem;
  return outcome_of([&] {
    HopperAttentionFwdParams params{};
    params.p = forward_params(x);
    params.p.row_blocks = (params.p.rows + Tile::kRows - 1) / Tile::kRows;
    for (int i = 0; i < 2; ++i) {
      const AttentionKeys<uint16_t>& keys = params.p.keys[i];
      params.keys[i] = {map_of(keys.k, x, keys.count, 64),
                        map_of(keys.k, x, keys.count, Tile::kKeyTail), 1, 1};
      params.values[i] = {map_of(keys.v, x, keys.count, 64),
                          map_of(keys.v, x, keys.count, Tile::kTail), 1, 1};
    }
    run("hopper", gqa_attention_hopper_config<72>(x.B * x.G, params.p.rows),
        gqa_attention_hopper_fwd_kernel<72, Dtype::kBFloat16>, params);
  });
}
