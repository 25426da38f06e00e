// CUDA launchers of swiglu.
#include "cuda/lib/flat_launch.h"
#include "cuda/swiglu.cuh"

namespace lumina_kernels::cuda {
namespace {

Tensor swiglu_fwd(const Tensor& a, const Tensor& b) {
  Tensor out = empty_as(a);
  if (out.numel() == 0) return out;
  const auto [rows, F] = flat_shape({a, b});
  const Tensor as = flat(a, rows, F), bs = flat(b, rows, F), outs = flat(out, rows, F);
  const SwigluFwdParams p{.a = values_of(as),
                          .b = values_of(bs),
                          .out = values_of(outs),
                          .a_step = as.stride(0),
                          .b_step = bs.stride(0),
                          .rows = rows,
                          .F = F};
  LUMINA_LAUNCH(a, flat_config(rows, F), swiglu_fwd_kernel, p);
  return out;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dout, const Tensor& a, const Tensor& b) {
  Tensor da = empty_as(a), db = empty_as(b);
  if (da.numel() == 0) return {da, db};
  const auto [rows, F] = flat_shape({dout, a, b});
  const Tensor douts = flat(dout, rows, F), as = flat(a, rows, F), bs = flat(b, rows, F);
  const Tensor das = flat(da, rows, F), dbs = flat(db, rows, F);
  const SwigluBwdParams p{.dout = values_of(douts),
                          .a = values_of(as),
                          .b = values_of(bs),
                          .da = values_of(das),
                          .db = values_of(dbs),
                          .dout_step = douts.stride(0),
                          .a_step = as.stride(0),
                          .b_step = bs.stride(0),
                          .rows = rows,
                          .F = F};
  LUMINA_LAUNCH(a, flat_config(rows, F), swiglu_bwd_kernel, p);
  return {da, db};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd));
}

}  // namespace lumina_kernels::cuda
