// The natural log-sum-exp of gqa_attention's scores, from what the forward kernels keep of a row.
#pragma once

#include "cuda/gqa_attention_keys.cuh"

namespace lumina_kernels::cuda {

constexpr int kLseThreads = 256;

struct AttentionLseParams {
  Global<const float> stats;  // (B, G, L, R, 2)
  Global<float> lse;          // (B, L, H)
  float outer;                // of the scale's split
  int64_t rows;               // B * L * H
  int L, G, R;
};

inline LaunchConfig gqa_attention_lse_config(int64_t rows) {
  return {dim3(static_cast<unsigned>(ceil_div(rows, kLseThreads))), dim3(kLseThreads)};
}

// A kernel of its own, so that the forward ones, which are short of registers, stay as they are.
__global__ void __launch_bounds__(kLseThreads)
    gqa_attention_lse_kernel(const AttentionLseParams p) {
  const int64_t row = int64_t{block_index()} * kLseThreads + thread_index();
  if (row >= p.rows) return;
  const int64_t group = divide(row, p.R), token = divide(group, p.G), b = divide(token, p.L);
  const int64_t head = b * p.G + (group - token * p.G);
  const int64_t at = (head * p.L + (token - b * p.L)) * p.R + (row - group * p.R);
  const auto kept = load_global<float2>(p.stats + 2 * at);
  const float lse = (kept.x * p.outer + kept.y) * kLn2;
  p.lse[row] = kept.y == -kMinusInfinity ? kLseFloor : lse;
}

}  // namespace lumina_kernels::cuda
