// The first kernel of gqa_attention's backward: what the others need of every row.
#pragma once

#include "cuda/gqa_attention_bwd.cuh"
#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

constexpr int kTermThreads = 128, kTermLanes = 4;  // lanes of a row

struct AttentionTermsParams {
  Values dout;  // of which head h of token l of sample b starts at these steps
  int64_t step_b, step_l, step_h;
  Values out, gate;              // (B, L, H, K), (H,)
  Global<const uint8_t> error;   // the rounding error of out, or null
  Global<const float> stats[2];  // (B, G, L, R, 2); the text's may be null
  Global<const float> dlse;      // gradient of the log-sum-exp, (B, L, H), or null
  Global<float> terms[2];
  float before;
  int64_t rows;  // B * G * L * R
  int L, G, R, K;
};

inline LaunchConfig gqa_attention_terms_config(int64_t rows) {
  constexpr int kRows = kTermThreads / kTermLanes;
  return {dim3(static_cast<unsigned>(ceil_div(rows, kRows))), dim3(kTermThreads)};
}

// 8 values of out as they were before rounding, to about 7 more bits.
__device__ __forceinline__ Float8 add_error(const Float8& out, Global<const uint8_t> error,
                                            bool vector, int count, Dtype dtype) {
  const float half = dtype == Dtype::kHalf ? 0x1p-11f / 127 : 0x1p-8f / 127;
  uint2 bits = make_uint2(0, 0);
  if (vector) bits = load_global<uint2>(error);
  return by_column([&](int k) {
    uint32_t byte = (k < 4 ? bits.x : bits.y) >> k % 4 * 8;
    if (!vector && k < count) byte = load_global<uint8_t>(error + k);
    return out[k] + static_cast<float>(static_cast<int8_t>(byte)) * (fabsf(out[k]) * half);
  });
}

// dout . out of every row, and the terms of both branches but for what the text's e adds.
__global__ void __launch_bounds__(kTermThreads)
    gqa_attention_terms_kernel(const AttentionTermsParams p) {
  const int thread = thread_index(), lane = thread % kTermLanes;
  const int64_t row = int64_t{block_index()} * (kTermThreads / kTermLanes) + thread / kTermLanes;
  const bool there = row < p.rows;
  float total = 0.0f;
  int h = 0;
  if (there) {
    const int64_t token = divide(row, p.R), heads = divide(token, p.L), b = divide(heads, p.G);
    const int64_t l = token - heads * p.L;
    h = static_cast<int>((heads - b * p.G) * p.R + (row - token * p.R));
    const int64_t from = b * p.step_b + l * p.step_l + h * p.step_h;
    const int64_t out_row = (b * p.L + l) * p.G * p.R + h, at = out_row * p.K;
    for (int column = 8 * lane; column < p.K; column += 8 * kTermLanes) {
      const int count = p.K - column;
      Float8 out = load8(p.out, at + column, count);
      if (p.error != nullptr) {
        out = add_error(out, p.error + (at + column), p.out.vectors && count >= 8, count,
                        p.out.dtype);
      }
      add_products(total, load8(p.dout, from + column, count), out);
    }
    // The gradient of a score from it is P dlse.
    if (p.dlse != nullptr && lane == 0) total -= load_global<float>(p.dlse + out_row);
  }
  total += __shfl_xor_sync(kAllLanes, total, 1);
  total += __shfl_xor_sync(kAllLanes, total, 2);
  if (!there || lane > 1 || p.stats[lane] == nullptr) return;
  const float top = load_global<float>(p.stats[lane] + 2 * row);
  const float part = exp2f(-load_global<float>(p.stats[lane] + (2 * row + 1)));
  const float weight = lane == 0 ? 1.0f : tanhf(load1(p.gate, h));
  store_global(p.terms[lane] + kRowTerms * row,
               make_float4(top, weight * part, lane == 0 ? p.before * total : 0.0f, part));
}

}  // namespace lumina_kernels::cuda
