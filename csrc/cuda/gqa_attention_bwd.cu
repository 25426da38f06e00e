// CUDA launcher of gqa_attention's backward.
#include "cuda/gqa_attention_bwd_float.cuh"
#include "cuda/gqa_attention_bwd_launch.h"
#include "cuda/gqa_attention_terms.cuh"

namespace lumina_kernels::cuda {
namespace {

// What the forward kept, and the gradients of its outputs.
struct AttentionKept {
  Tensor dout, out, error, stats, text_stats;
  OptionalTensor dlse;
};

// Results, of which those without elements are none, and what the kernels tell each other.
struct AttentionWork {
  Tensor dq, dk, dv, dtext_k, dtext_v, dbias;
  Tensor terms, text_terms, gate_terms;
};

void launch_terms(const AttentionInputs& x, const AttentionKept& saved, const AttentionWork& grads,
                  float before) {
  AttentionTermsParams p{};
  p.dout = values_of(saved.dout);
  p.dout.vectors &= x.q.size(3) % 8 == 0;
  p.step_b = step(saved.dout, 0), p.step_l = step(saved.dout, 1), p.step_h = step(saved.dout, 2);
  p.out = values_of(saved.out), p.gate = values_of(x.text_gate);
  if (saved.error.numel() > 0) p.error = pointer_to<const uint8_t>(saved.error);
  p.dlse = pointer_to<const float>(saved.dlse);
  p.stats[0] = pointer_to<const float>(saved.stats);
  p.terms[0] = pointer_to<float>(grads.terms);
  if (x.text_k) {
    p.stats[1] = pointer_to<const float>(saved.text_stats);
    p.terms[1] = pointer_to<float>(grads.text_terms);
  }
  p.before = before;
  p.rows = saved.stats.numel() / 2;
  p.L = static_cast<int>(x.q.size(1)), p.G = static_cast<int>(x.k.size(2));
  p.R = static_cast<int>(x.q.size(2) / x.k.size(2)), p.K = static_cast<int>(x.q.size(3));
  LUMINA_LAUNCH(x.q, gqa_attention_terms_config(p.rows), gqa_attention_terms_kernel, p);
}

template <class T>
AttentionBwdParams<T> arguments(const AttentionInputs& x, const AttentionKept& saved,
                                const AttentionWork& grads) {
  AttentionBwdParams<T> p{};
  p.fwd = attention_params<T>(x);
  p.dout = heads_of<T>(saved.dout);
  p.by_R = Divider(p.fwd.R), p.by_G = Divider(p.fwd.G);
  p.row_vectors = p.fwd.q_vectors && takes_vectors(saved.dout) && p.fwd.K % 8 == 0;
  p.terms[0] = pointer_to<float>(grads.terms);
  p.dq = pointer_to<T>(grads.dq);
  p.dk[0] = pointer_to<T>(grads.dk), p.dv[0] = pointer_to<T>(grads.dv);
  // float16 has a small range: there sums are never infinite, but products might be 0.
  const bool half = x.q.scalar_type() == ScalarType::Half;
  p.before[0] = half ? 1.0f : split_scale(x.scale).inner;
  p.before[1] = half ? 1.0f : p.fwd.keys[1].split.inner;
  if (p.fwd.text) {
    p.terms[1] = pointer_to<float>(grads.text_terms);
    p.gate_terms = pointer_to<float>(grads.gate_terms);
    p.dk[1] = pointer_to<T>(grads.dtext_k), p.dv[1] = pointer_to<T>(grads.dtext_v);
  }
  if (grads.dbias.numel() > 0) p.dbias = pointer_to<float>(grads.dbias);
  return p;
}

template <int kLaneColumns>
void launch_float(const Tensor& like, AttentionBwdParams<float> p, int64_t B) {
  using DqTile = AttentionFloatBwdTile<kLaneColumns, 1>;
  using DkvTile = AttentionFloatBwdTile<kLaneColumns, 2>;
  p.fwd.row_blocks = static_cast<int>(ceil_div(p.fwd.rows, DqTile::kRows));
  LUMINA_LAUNCH(like, gqa_attention_float_bwd_config<DqTile>(B * p.fwd.G * p.fwd.row_blocks),
                gqa_attention_float_dq_kernel<kLaneColumns>, p);
  const int64_t blocks = set_key_blocks(p, B, DkvTile::kRows);
  if (blocks == 0) return;
  LUMINA_LAUNCH(like, gqa_attention_float_bwd_config<DkvTile>(blocks),
                gqa_attention_float_dkv_kernel<kLaneColumns>, p);
}

void launch(const AttentionInputs& x, const AttentionKept& saved, const AttentionWork& grads) {
  const int64_t B = x.q.size(0);
  if (dtype_of(x.q) == Dtype::kFloat) {
    const AttentionBwdParams<float> p = arguments<float>(x, saved, grads);
    launch_terms(x, saved, grads, p.before[0]);
    with_size(ceil_div(p.fwd.K, 32), AttentionFloatColumns(),
              [&](auto columns) { launch_float<columns()>(x.q, p, B); });
    return;
  }
  const AttentionBwdParams<uint16_t> p = arguments<uint16_t>(x, saved, grads);
  launch_terms(x, saved, grads, p.before[0]);
  launch_dq(x.q, p, B, dtype_of(x.q));
  launch_dkv(x.q, p, B, dtype_of(x.q));
}

// The sum over samples and tokens, for which the kernels left (B, G, L, R).
Tensor gate_gradient(const Tensor& terms, const Tensor& gate) {
  const int64_t axes[] = {0, 2};
  const torch::headeronly::IntHeaderOnlyArrayRef all(axes, 2);
  const Tensor sum = torch::stable::sum(terms, all, false);
  return torch::stable::to(torch::stable::reshape(sum, gate.sizes()), gate.scalar_type());
}

}  // namespace

AttentionGrads attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& out,
                                  const Tensor& error, const Tensor& stats,
                                  const Tensor& text_stats, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const OptionalTensor& key_mask, double scale,
                                  const OptionalTensor& text_k, const OptionalTensor& text_v,
                                  const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                                  const OptionalTensor& bias, bool with_dbias) {
  const AttentionInputs x =
      attention_inputs(q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate, bias);
  check_sizes(x);
  const bool some = q.numel() > 0;  // or else nothing is launched
  const auto result = [&](const Tensor& like) { return some ? empty_as(like) : zeros_as(like); };
  const auto optional = [&](const OptionalTensor& x) { return x ? result(*x) : nothing(q); };
  const auto work = [&](bool wanted, int64_t numbers) {
    return wanted ? empty(q, {q.size(0), k.size(2), q.size(1), q.size(2) / k.size(2), numbers},
                          ScalarType::Float)
                  : nothing(q);
  };
  const int64_t pairs[] = {q.size(0), q.size(2), q.size(1), k.size(1)};
  AttentionWork grads{
      .dq = result(q),
      .dk = result(k),
      .dv = result(v),
      .dtext_k = optional(text_k),
      .dtext_v = optional(text_v),
      // Of masked keys nothing is computed.
      .dbias = with_dbias ? torch::stable::new_zeros(q, {pairs, 4}, ScalarType::Float) : nothing(q),
      .terms = work(true, kRowTerms),
      .text_terms = work(text_k.has_value(), kRowTerms),
      .gate_terms = work(text_k.has_value(), 1)};
  Tensor dgate = text_gate ? zeros_as(*text_gate) : nothing(q);
  if (some) {
    launch(x, {packed(dout), torch::stable::contiguous(out), error, stats, text_stats, dlse},
           grads);
    if (text_gate) dgate = gate_gradient(grads.gate_terms, *text_gate);
  }
  if (with_dbias) grads.dbias = sum_to(grads.dbias, *bias);
  return {grads.dq, grads.dk, grads.dv, grads.dtext_k, grads.dtext_v, dgate, grads.dbias};
}

static AttentionGrads gqa_attention_bwd(const Tensor& dout, const Tensor& out, const Tensor& error,
                                        const Tensor& stats, const Tensor& text_stats,
                                        const Tensor& q, const Tensor& k, const Tensor& v,
                                        const OptionalTensor& key_mask, double scale,
                                        const OptionalTensor& text_k, const OptionalTensor& text_v,
                                        const OptionalTensor& text_mask,
                                        const OptionalTensor& text_gate, const OptionalTensor& bias,
                                        bool with_dbias) {
  return attention_backward(dout, OptionalTensor(), out, error, stats, text_stats, q, k, v,
                            key_mask, scale, text_k, text_v, text_mask, text_gate, bias,
                            with_dbias);
}

LUMINA_CUDA_LIBRARY(m) { m.impl("gqa_attention_bwd", TORCH_BOX(&gqa_attention_bwd)); }

}  // namespace lumina_kernels::cuda
