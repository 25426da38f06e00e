// CUDA launcher of gqa_attention's gradients of keys and values.
#include "cuda/gqa_attention_bwd_launch.h"
#include "cuda/gqa_attention_dkv.cuh"

namespace lumina_kernels::cuda {

void launch_dkv(const Tensor& like, AttentionBwdParams<uint16_t> p, int64_t B, Dtype dtype) {
  with_bwd_size(p, [&](auto K, auto extras) {
    constexpr int kK = K();
    constexpr bool kExtras = extras();
    const int64_t blocks = set_key_blocks(p, B, AttentionDkvTile<kK, kExtras>::kKeys);
    if (blocks == 0) return;
    const LaunchConfig config = gqa_attention_dkv_config<kK, kExtras>(blocks);
    if (dtype == Dtype::kHalf) {
      LUMINA_LAUNCH(like, config, (gqa_attention_dkv_kernel<kK, Dtype::kHalf, kExtras>), p);
    } else {
      LUMINA_LAUNCH(like, config, (gqa_attention_dkv_kernel<kK, Dtype::kBFloat16, kExtras>), p);
    }
  });
}

}  // namespace lumina_kernels::cuda
