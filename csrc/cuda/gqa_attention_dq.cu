// CUDA launcher of gqa_attention's gradient of q.
#include "cuda/gqa_attention_bwd_launch.h"
#include "cuda/gqa_attention_dq.cuh"

namespace lumina_kernels::cuda {

void launch_dq(const Tensor& like, AttentionBwdParams<uint16_t> p, int64_t B, Dtype dtype) {
  with_bwd_size(p, [&](auto K, auto extras) {
    constexpr int kK = K();
    constexpr bool kExtras = extras();
    p.fwd.row_blocks = static_cast<int>(ceil_div(p.fwd.rows, AttentionDqTile<kK, kExtras>::kRows));
    const LaunchConfig config = gqa_attention_dq_config<kK, kExtras>(B * p.fwd.G, p.fwd.rows);
    if (dtype == Dtype::kHalf) {
      LUMINA_LAUNCH(like, config, (gqa_attention_dq_kernel<kK, Dtype::kHalf, kExtras>), p);
    } else {
      LUMINA_LAUNCH(like, config, (gqa_attention_dq_kernel<kK, Dtype::kBFloat16, kExtras>), p);
    }
  });
}

}  // namespace lumina_kernels::cuda
