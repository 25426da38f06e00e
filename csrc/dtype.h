// What both rooms share and device code may use: no torch in here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(LUMINA_CUDA_HOST)
#define LUMINA_HOST_DEVICE __host__ __device__
#else
#define LUMINA_HOST_DEVICE
#endif

namespace lumina_kernels {

// A dtype is data: a branch that is always taken the same way costs less than code for each dtype.
enum class Dtype : int32_t { kFloat, kHalf, kBFloat16 };

LUMINA_HOST_DEVICE constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

LUMINA_HOST_DEVICE constexpr int64_t ceil_div(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

}  // namespace lumina_kernels
