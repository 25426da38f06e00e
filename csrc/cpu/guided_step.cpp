// CPU kernel of guided_step: elementwise over the state and the two halves of the velocity.
#define LUMINA_FILE "cpu/guided_step.cpp"
#include "cpu/lib/levels.h"

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// out = x + dt * (uncond + weight * (cond - uncond)), or x + dt * cond without uncond.
void guided_step_fwd(Row x, Row cond, Row uncond, Row out, float weight, float dt, int64_t length) {
  for_vectors(length, [&](int64_t i, int64_t count) {
    Vec u = load(cond, i, count);
    if (uncond) {
      const Vec base = load(uncond, i, count);
      u = base + weight * (u - base);
    }
    store(out, i, load(x, i, count) + dt * u, count);
  });
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

float value_of(const OptionalTensor& tensor, double value) {
  if (!tensor) return static_cast<float>(value);
  if (tensor->scalar_type() == ScalarType::Float)
    return *static_cast<const float*>(tensor->const_data_ptr());
  return *static_cast<const float*>(torch::stable::to(*tensor, ScalarType::Float).const_data_ptr());
}

Tensor guided_step_fwd(const Tensor& x, const Tensor& v, const OptionalTensor& weight,
                       double weight_value, const OptionalTensor& dt, double dt_value,
                       int64_t channels) {
  Tensor out = empty_as(x);
  if (x.numel() == 0) return out;
  const int64_t B = x.size(0), N = x.numel() / B, guided = N / x.size(1) * channels;
  const Rows xs = flat_rows(x, B), vs = flat_rows(v, 2 * B), outs = flat_rows(out, B);
  const float w = value_of(weight, weight_value), step = value_of(dt, dt_value);
  parallel_pieces(B, N, [&](int64_t b, int64_t first, int64_t count) {
    const int64_t end = first + count, border = std::min(std::max(guided, first), end);
    const auto call = [&](int64_t i, int64_t length, Row uncond) {
      LUMINA_CALL(guided_step_fwd, xs(b) + i, vs(b) + i, uncond, outs(b) + i, w, step, length);
    };
    call(first, border - first, vs(B + b) + first);
    call(border, end - border, Row{});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("guided_step_fwd", TORCH_BOX(&guided_step_fwd));
}

}  // namespace lumina_kernels::cpu
#endif
