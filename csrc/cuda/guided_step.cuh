// CUDA kernel of guided_step: reads the state and both halves of the velocity, writes the new
// state.
#pragma once

#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

constexpr int kGuidedStepThreads = 256;

// x and out (B, N), v (2B, N), without gaps. A weight or dt in a tensor stays on the device.
struct GuidedStepFwdParams {
  Values x, v, out;
  Values weight, dt;  // null if given as a number
  float weight_value, dt_value;
  int64_t B, N, guided;
};

// A thread takes 8 values of a sample.
inline LaunchConfig guided_step_config(int64_t B, int64_t N) {
  const int64_t blocks = ceil_div(B * ceil_div(N, 8), kGuidedStepThreads);
  return {dim3(static_cast<unsigned>(blocks)), dim3(kGuidedStepThreads)};
}

// out = x + dt * (uncond + weight * (cond - uncond)) for the first `guided` values of a sample, x +
// dt * cond for the others.
__global__ void __launch_bounds__(kGuidedStepThreads)
    guided_step_fwd_kernel(const GuidedStepFwdParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGuidedStepThreads + threadIdx.x;
  const int64_t pieces = ceil_div(p.N, 8), b = divide(i, pieces), first = (i - b * pieces) * 8;
  if (b >= p.B) return;
  const int count = static_cast<int>(min(p.N - first, int64_t{8}));
  const Bits8 x_bits = load_bits8(p.x, b * p.N + first, count);
  const Bits8 cond_bits = load_bits8(p.v, b * p.N + first, count);
  const Bits8 uncond_bits = load_bits8(p.v, (p.B + b) * p.N + first, count);
  const Float8 x = to_float8(x_bits, p.x.dtype);
  const Float8 cond = to_float8(cond_bits, p.v.dtype), uncond = to_float8(uncond_bits, p.v.dtype);
  const float weight = is_there(p.weight) ? load1(p.weight, 0) : p.weight_value;
  const float dt = is_there(p.dt) ? load1(p.dt, 0) : p.dt_value;
  const Float8 guidance = uncond + weight * (cond - uncond);
  const Float8 velocity =
      by_column([&](int k) { return first + k < p.guided ? guidance[k] : cond[k]; });
  store8(p.out, b * p.N + first, count, x + dt * velocity);
}

}  // namespace lumina_kernels::cuda
