// Shared by the CPU and the CUDA code: dtypes, without torch, as device code uses them too.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(LUMINA_CUDA_HOST)
#define LUMINA_HOST_DEVICE __host__ __device__
#else
#define LUMINA_HOST_DEVICE
#endif

namespace lumina_kernels {

// A GPU reads kernel arguments as words; on a CPU, bytes take fewer instructions (0.5 % of the
// backward of norm_modulate).
#if defined(__CUDACC__) || defined(LUMINA_CUDA_HOST)
using DtypeBits = int32_t;
#else
using DtypeBits = int8_t;
#endif

// A dtype is data: a branch that is always taken the same way costs less than code for each dtype.
enum class Dtype : DtypeBits { kFloat, kHalf, kBFloat16 };

LUMINA_HOST_DEVICE constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

LUMINA_HOST_DEVICE constexpr int64_t ceil_div(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

}  // namespace lumina_kernels
