// CUDA launchers of gelu.
#include "cuda/gelu.cuh"
#include "cuda/lib/flat_launch.h"

namespace lumina_kernels::cuda {
namespace {

Tensor gelu_fwd(const Tensor& x, bool tanh) {
  Tensor out = empty_as(x);
  if (out.numel() == 0) return out;
  const auto [rows, F] = flat_shape({x});
  const Tensor xs = flat(x, rows, F), outs = flat(out, rows, F);
  const GeluFwdParams p{
      .x = values_of(xs), .out = values_of(outs), .x_step = xs.stride(0), .rows = rows, .F = F};
  if (tanh) {
    LUMINA_LAUNCH(x, flat_config(rows, F), gelu_fwd_kernel<true>, p);
  } else {
    LUMINA_LAUNCH(x, flat_config(rows, F), gelu_fwd_kernel<false>, p);
  }
  return out;
}

Tensor gelu_bwd(const Tensor& dout, const Tensor& x, bool tanh) {
  Tensor dx = empty_as(x);
  if (dx.numel() == 0) return dx;
  const auto [rows, F] = flat_shape({dout, x});
  const Tensor douts = flat(dout, rows, F), xs = flat(x, rows, F), dxs = flat(dx, rows, F);
  const GeluBwdParams p{.dout = values_of(douts),
                        .x = values_of(xs),
                        .dx = values_of(dxs),
                        .dout_step = douts.stride(0),
                        .x_step = xs.stride(0),
                        .rows = rows,
                        .F = F};
  if (tanh) {
    LUMINA_LAUNCH(x, flat_config(rows, F), gelu_bwd_kernel<true>, p);
  } else {
    LUMINA_LAUNCH(x, flat_config(rows, F), gelu_bwd_kernel<false>, p);
  }
  return dx;
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("gelu_fwd", TORCH_BOX(&gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_bwd));
}

}  // namespace lumina_kernels::cuda
