// CUDA kernel of the second stage of a modulated norm's parameter gradients.
#pragma once

#include "cuda/lib/rows_bwd.cuh"

namespace lumina_kernels::cuda {

// The second stage. A gradient that is not wanted is null; scale and shift are (B, D) here, and
// scale is null where it has a row per token.
struct ModulationGradsParams {
  PartialSums partials;
  Values weight, bias;
  RowsView scale;
  Values dweight, dbias, dscale, dshift;
};

// Of the sums A of f * d * n and E of f * d over a sample's rows: dscale = A * weight + E * bias,
// dshift = E, dweight = sum_b (1 + scale) * A, dbias = sum_b (1 + scale) * E.
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    modulation_grads_kernel(const ModulationGradsParams p) {
  const int D = p.partials.D;
  const int column = static_cast<int>(blockIdx.x) * kSumColumns + static_cast<int>(threadIdx.x);
  const auto finish = [&](int64_t b, float (&S)[2]) {
    const int64_t i = b * D + column;
    if (is_there(p.dshift)) store1(p.dshift, i, S[1]);
    if (!is_there(p.scale)) return;
    const float w = is_there(p.weight) ? load1(p.weight, column) : 1.0f;
    const float bias = is_there(p.bias) ? load1(p.bias, column) : 0.0f;
    if (is_there(p.dscale)) store1(p.dscale, i, S[0] * w + S[1] * bias);
    const float factor = 1.0f + load1(p.scale.values, p.scale.row(b, 0) + column);
    S[0] *= factor;
    S[1] *= factor;
  };
  float total[2];
  sum_partials(p.partials, column, finish, total);
  if (threadIdx.y != 0 || column >= D) return;
  if (is_there(p.dweight)) store1(p.dweight, column, total[0]);
  if (is_there(p.dbias)) store1(p.dbias, column, total[1]);
}

}  // namespace lumina_kernels::cuda
