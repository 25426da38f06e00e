// The backward: terms of rows, dq, and dk and dv.
#include "cuda/gqa_attention_dkv.cuh"
#include "cuda/gqa_attention_dq.cuh"
#include "cuda/gqa_attention_terms.cuh"
#include "mutants.h"

namespace lumina_kernels::cuda {
namespace {

using DqTile = AttentionDqTile<72, false>;
using DkvTile = AttentionDkvTile<72, false>;

AttentionTermsParams terms_params(const Problem& x, const AttentionBwdParams<uint16_t>& p) {
  AttentionTermsParams found{};
  found.dout = values(x.dout, x.rows() * x.K, Dtype::kBFloat16);
  found.step_b = p.dout.step_b, found.step_l = p.dout.step_l, found.step_h = p.dout.step_h;
  found.out = values(x.out, x.rows() * x.K, Dtype::kBFloat16);
  found.gate = p.fwd.gate;
  found.error = p.fwd.error;
  found.stats[0] = p.fwd.stats, found.stats[1] = p.fwd.text_stats;
  found.terms[0] = p.terms[0], found.terms[1] = p.terms[1];
  found.before = p.before[0];
  found.rows = x.rows();
  found.L = x.L, found.G = x.G, found.R = x.H / x.G, found.K = x.K;
  return found;
}

void compute(const Problem& x) {
  std::vector<float> terms[2];
  AttentionBwdParams<uint16_t> p{};
  p.fwd = forward_params(x);
  p.dout = heads(x.dout, x.B, x.L, x.H, x.K);
  for (int i = 0; i < 2; ++i) {
    terms[i].resize(kRowTerms * x.rows());
    p.terms[i] = pointer(terms[i].data(), kRowTerms * x.rows());
    const int64_t count = int64_t{1} * x.B * p.fwd.keys[i].count * x.G * x.K;
    p.dk[i] = pointer(i == 0 ? x.dk : x.dtext_k, count);
    p.dv[i] = pointer(i == 0 ? x.dv : x.dtext_v, count);
    p.before[i] = p.fwd.keys[i].split.inner;
    p.key_blocks[i] = (p.fwd.keys[i].count + DkvTile::kKeys - 1) / DkvTile::kKeys;
    p.by_blocks[i] = Divider(p.key_blocks[i]);
  }
  p.gate_terms = pointer(x.gate_terms, x.rows());
  p.dq = pointer(x.dq, x.rows() * x.K);
  p.by_R = Divider(p.fwd.R), p.by_G = Divider(p.fwd.G);
  p.row_vectors = true;
  p.text_blocks = x.B * x.G * p.key_blocks[1];
  p.fwd.row_blocks = (p.fwd.rows + DqTile::kRows - 1) / DqTile::kRows;
  run("terms", gqa_attention_terms_config(x.rows()), gqa_attention_terms_kernel,
      terms_params(x, p));
  run("dq", gqa_attention_dq_config<72, false>(x.B * x.G, p.fwd.rows),
      gqa_attention_dq_kernel<72, Dtype::kBFloat16, false>, p);
  run("dkv", gqa_attention_dkv_config<72, false>(p.text_blocks + x.B * x.G * p.key_blocks[0]),
      gqa_attention_dkv_kernel<72, Dtype::kBFloat16, false>, p);
}

}  // namespace
}  // namespace lumina_kernels::cuda

const char* mutant(const lumina_kernels::cuda::Problem* problem) {
  return lumina_kernels::cuda::outcome_of([&] { lumina_kernels::cuda::compute(*problem); });
}
