// Shared by all CUDA launchers (.cu): torch's tensors as kernel arguments, and the launch.
//
// On the host (LUMINA_CUDA_HOST, see tests/cuda_host) the same launchers take CPU tensors, and a
// launch runs the kernel there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#ifndef LUMINA_CUDA_HOST
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "cuda/lib/values.cuh"
#include "tensor.h"

// Registers launchers for CUDA. The schemas are declared in lumina_kernels/ops/<op>.py.
#ifdef LUMINA_CUDA_HOST
#define LUMINA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cuda_host, CPU, m)
#else
#define LUMINA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CUDA, m)
#endif

// LUMINA_LAUNCH(tensor, config, kernel, arguments...) launches on the current stream of the
// tensor's device. A kernel with several template arguments needs parentheses: (kernel<1, 2>).
#define LUMINA_LAUNCH(like, config, kernel, ...) \
  ::lumina_kernels::cuda::launch(#kernel, like, config, kernel, __VA_ARGS__)

namespace lumina_kernels::cuda {

#ifdef LUMINA_CUDA_HOST

template <class... Parameters, class... Arguments>
void launch(const char* name, const Tensor&, const LaunchConfig& config,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  auto body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  cuda_host::run(
      name, config.grid, config.block, config.shared_bytes,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

inline int processors_of(const Tensor&) { return cuda_host::multiprocessors; }

// Blocks of a kernel that run at once on a device: some number here.
template <class Kernel>
int64_t blocks_at_once(const Tensor&, Kernel, const dim3&) {
  return 6;
}

#else

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// PyTorch's current stream. The function is looked up at run time: it is part of libtorch_cuda,
// which a CPU-only torch, against which this file may be built, does not have.
inline cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, const Tensor& like, const LaunchConfig& config,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  constexpr size_t kSharedBytes = 48 << 10;  // a kernel has to ask for more
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (config.shared_bytes > kSharedBytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.shared_bytes)),
               name);
  }
  // clang-format off: it takes headers for plain C++ and would separate >>>
  kernel<<<config.grid, config.block, config.shared_bytes, current_stream(device)>>>(
      static_cast<Parameters>(arguments)...);
  // clang-format on
  check_cuda(cudaGetLastError(), name);
}

// Multiprocessors of the tensor's device.
inline int processors_of(const Tensor& like) {
  int count = 0;
  check_cuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like.get_device_index()),
      "processors");
  return count;
}

// Blocks of a kernel that run at once on the tensor's device.
template <class Kernel>
int64_t blocks_at_once(const Tensor& like, Kernel kernel, const dim3& block) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int threads = static_cast<int>(block.x * block.y);
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0),
             "occupancy");
  return int64_t{processors_of(like)} * blocks;
}

#endif

// --- tensors as arguments ---

// A tensor's data, which has to be of type T; const T for an input. On the host with its bounds.
template <class T>
Global<T> pointer_to(const Tensor& tensor) {
  T* data = static_cast<T*>(tensor.data_ptr());
#ifdef LUMINA_CUDA_HOST
  int64_t last = tensor.numel() == 0 ? -1 : 0;
  for (int64_t i = 0; last >= 0 && i < tensor.dim(); ++i) {
    last += (tensor.size(i) - 1) * tensor.stride(i);
  }
  const auto bytes = (last + 1) * static_cast<int64_t>(tensor.element_size());
  return {data, data, reinterpret_cast<const char*>(data) + bytes};
#else
  return data;
#endif
}

template <class T>
Global<T> pointer_to(const OptionalTensor& tensor) {
  return tensor ? pointer_to<T>(*tensor) : Global<T>(nullptr);
}

// 16-byte accesses need rows that start at multiples of 16 bytes.
inline bool takes_vectors(const Tensor& tensor) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    aligned &= tensor.size(i) == 1 || tensor.stride(i) * size % 16 == 0;
  }
  return aligned;
}

inline Values values_of(const Tensor& tensor) {
  return {pointer_to<unsigned char>(tensor), dtype_of(tensor), takes_vectors(tensor)};
}

inline Values values_of(const OptionalTensor& tensor) {
  return tensor ? values_of(*tensor) : Values{nullptr, Dtype::kFloat, false};
}

// The tensor, or a copy if its last dimension has gaps.
inline Tensor packed(const Tensor& tensor) {
  return is_packed(tensor) ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(packed(*tensor)) : tensor;
}

// The tensor, or a copy whose rows are aligned if they can be.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor x = packed(tensor);
  const int64_t width = tensor.dim() == 0 ? 1 : tensor.size(tensor.dim() - 1);
  if (takes_vectors(x) || width * static_cast<int64_t>(x.element_size()) % 16 != 0) return x;
  return torch::stable::to(x, x.scalar_type(), {}, {}, {}, false, /*copy=*/true,
                           torch::headeronly::MemoryFormat::Contiguous);
}

inline OptionalTensor aligned(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(aligned(*tensor)) : tensor;
}

// The rows of a packed tensor (D,), (B, D) or (B, L, D), which the caller keeps alive until the
// launch.
inline RowsView rows_of(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  return {values_of(tensor), dim > 1 ? tensor.stride(0) : 0, dim > 2 ? tensor.stride(1) : 0,
          dim > 2};
}

inline RowsView rows_of(const OptionalTensor& tensor) {
  return tensor ? rows_of(*tensor) : RowsView{values_of(tensor), 0, 0, false};
}

}  // namespace lumina_kernels::cuda
