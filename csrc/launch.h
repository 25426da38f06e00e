// What every CUDA launcher (.cu) shares: torch's tensors as kernel arguments, and the launch.
//
// On the host (LUMINA_CUDA_HOST, see tests/cuda_host) the same launchers take CPU tensors, and a
// launch runs the kernel there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifndef LUMINA_CUDA_HOST
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif

#include "common.cuh"

// Registers launchers for CUDA; the schemas are in <op>.cpp.
#ifdef LUMINA_CUDA_HOST
#define LUMINA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cuda_host, CPU, m)
#else
#define LUMINA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CUDA, m)
#endif

// LUMINA_LAUNCH(tensor, config, kernel, arguments...): on the current stream of tensor's device.
// A kernel that is a template of several arguments needs parentheses: (kernel<1, 2>).
#define LUMINA_LAUNCH(like, config, kernel, ...) \
  ::lumina_kernels::launch(#kernel, like, config, kernel, __VA_ARGS__)

// The same for `count` rows, or chunks of rows, of D values (rows.cuh): a kernel<kPieces, kWide>.
#define LUMINA_LAUNCH_ROWS(like, count, D, kernel, p)                           \
  if (row_is_wide(D)) {                                                         \
    LUMINA_LAUNCH(like, row_config(count, D), (kernel<1, true>), p);            \
  } else if (row_pieces(D) == 1) {                                              \
    LUMINA_LAUNCH(like, row_config(count, D), (kernel<1, false>), p);           \
  } else {                                                                      \
    LUMINA_LAUNCH(like, row_config(count, D), (kernel<kManyPieces, false>), p); \
  }

namespace lumina_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef LUMINA_CUDA_HOST

template <class... Parameters, class... Arguments>
void launch(const char* name, const Tensor&, const LaunchConfig& config,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  auto body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  cuda_host::run(
      name, config.grid, config.block, config.shared_bytes,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

#else

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// PyTorch's current stream. Its function is looked up at run time: it lives in libtorch_cuda, which
// a CPU-only torch, with which this file may be built, does not have.
inline cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes a device current, and the former one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) : device_(device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0, device_;
};

template <class... Parameters, class... Arguments>
void launch(const char* name, const Tensor& like, const LaunchConfig& config,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  constexpr size_t kSharedBytes = 48 << 10;  // more has to be asked for
  const int32_t device = like.get_device_index();
  const DeviceGuard guard(device);
  if (config.shared_bytes > kSharedBytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.shared_bytes)),
               name);
  }
  // clang-format off: it takes a header for plain C++, and >>> apart
  kernel<<<config.grid, config.block, config.shared_bytes, current_stream(device)>>>(
      static_cast<Parameters>(arguments)...);
  // clang-format on
  check_cuda(cudaGetLastError(), name);
}

#endif

// --- tensors as arguments ---

// A tensor's data as T, which it has to be; const T for an input. On the host with its bounds.
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

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
      return Dtype::kFloat;
  }
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

// The tensor, or a copy where its last dimension has gaps.
inline Tensor packed(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor
                                                            : torch::stable::contiguous(tensor);
}

inline OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(packed(*tensor)) : tensor;
}

// Of a packed tensor (D,), (B, D) or (B, L, D). The caller keeps the tensor until the launch.
inline Rows rows_of(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  return {values_of(tensor), dim > 1 ? tensor.stride(0) : 0, dim > 2 ? tensor.stride(1) : 0,
          dim > 2};
}

inline Rows rows_of(const OptionalTensor& tensor) {
  return tensor ? rows_of(*tensor) : Rows{values_of(tensor), 0, 0, false};
}

// --- outputs, contiguous, on like's device ---

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}
inline Tensor empty_as(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }
inline Tensor zeros_as(const Tensor& like) { return torch::stable::new_zeros(like, like.sizes()); }
// A result that is not there, as an op returns no None; float32 whatever the op (kernel_op.py).
inline Tensor nothing(const Tensor& like) { return empty(like, {0}, ScalarType::Float); }

// A gradient that is wanted where the input is there; `nothing` else.
inline Tensor empty_as(const OptionalTensor& x, const Tensor& like) {
  return x ? empty_as(*x) : nothing(like);
}
inline Tensor zeros_as(const OptionalTensor& x, const Tensor& like) {
  return x ? zeros_as(*x) : nothing(like);
}

}  // namespace lumina_kernels
