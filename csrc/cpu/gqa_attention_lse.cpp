// gqa_attention with its log-sum-exp: the same kernels, without text.
#include "cpu/gqa_attention.h"

namespace lumina_kernels::cpu {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results gqa_attention_lse_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                              const OptionalTensor& key_mask, double scale,
                              const OptionalTensor& bias, bool with_error) {
  const OptionalTensor none;
  const Tensor lse = empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const auto [out, error, stats, text_stats] =
      attention_forward(q, k, v, key_mask, scale, none, none, none, none, bias, with_error,
                        static_cast<float*>(lse.data_ptr()));
  return {out, lse, error, stats};
}

Results gqa_attention_lse_bwd(const Tensor& dout, const Tensor& dlse, const Tensor& out,
                              const Tensor& error, const Tensor& stats, const Tensor& q,
                              const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
                              double scale, const OptionalTensor& bias, bool with_dbias) {
  const OptionalTensor none;
  const Tensor packed = torch::stable::contiguous(dlse);
  const auto grads = attention_backward(dout, static_cast<const float*>(packed.data_ptr()), out,
                                        error, stats, nothing(q), q, k, v, key_mask, scale, none,
                                        none, none, none, bias, with_dbias);
  return {std::get<0>(grads), std::get<1>(grads), std::get<2>(grads), std::get<6>(grads)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("gqa_attention_lse_fwd", TORCH_BOX(&gqa_attention_lse_fwd));
  m.impl("gqa_attention_lse_bwd", TORCH_BOX(&gqa_attention_lse_bwd));
}

}  // namespace lumina_kernels::cpu
