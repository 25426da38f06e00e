// What the mutants of attention's kernels are given, as mutants.py has it, and how they are run. No
// torch: a mutant is compiled in a few seconds.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/gqa_attention_keys.cuh"

namespace lumina_kernels::cuda {

// Contiguous tensors of bfloat16, if nothing else is said.
struct Problem {
  int B, L, H, G, L_kv, T, K;
  double scale;
  uint16_t *q, *k, *v, *text_k, *text_v, *dout;
  uint8_t *mask, *text_mask;
  float* gate;
  uint16_t* out;
  uint8_t* error;
  float *stats, *text_stats;
  uint16_t *dq, *dk, *dv, *dtext_k, *dtext_v;
  float* gate_terms;

  int64_t rows() const { return int64_t{1} * B * L * H; }
};

template <class T>
Global<T> pointer(T* at, int64_t count) {
  return {at, at, at + count};
}

inline AttentionHeads<uint16_t> heads(const uint16_t* x, int B, int L, int H, int K) {
  return {pointer(x, int64_t{1} * B * L * H * K), L * H * K, H * K, K};
}

inline AttentionKeys<uint16_t> keys_of(const Problem& x, bool text) {
  const int count = text ? x.T : x.L_kv;
  const double scale = text ? 1 / std::sqrt(static_cast<double>(x.K)) : x.scale;
  return {.k = heads(text ? x.text_k : x.k, x.B, count, x.G, x.K),
          .v = heads(text ? x.text_v : x.v, x.B, count, x.G, x.K),
          .mask = pointer<const uint8_t>(text ? x.text_mask : x.mask, x.B * count),
          .mask_step = count,
          .count = count,
          .scale = static_cast<float>(scale),
          .split = split_scale(scale),
          .vectors = true,
          .mask_vectors = count % 16 == 0};
}

inline Values values(const void* at, int64_t count, Dtype dtype) {
  const auto* bytes = static_cast<const unsigned char*>(at);
  const int64_t size = dtype == Dtype::kFloat ? 4 : 2;
  return {pointer(const_cast<unsigned char*>(bytes), size * count), dtype, true};
}

inline AttentionFwdParams<uint16_t> forward_params(const Problem& x) {
  AttentionFwdParams<uint16_t> p{};
  p.q = heads(x.q, x.B, x.L, x.H, x.K);
  p.keys[0] = keys_of(x, false), p.keys[1] = keys_of(x, true);
  p.gate = values(x.gate, x.H, Dtype::kFloat);
  p.out = pointer(x.out, x.rows() * x.K), p.error = pointer(x.error, x.rows() * x.K);
  p.stats = pointer(x.stats, 2 * x.rows());
  p.text_stats = pointer(x.text_stats, 2 * x.rows());
  p.L = x.L, p.G = x.G, p.R = x.H / x.G, p.K = x.K, p.rows = p.L * p.R;
  p.q_vectors = p.text = true;
  return p;
}

template <class Params>
void run(const char* name, const LaunchConfig& config, void (*kernel)(Params), const Params& p) {
  auto body = [&] { kernel(p); };
  cuda_host::run(
      name, config.grid, config.block, config.shared_bytes,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

// What `compute` raises, or "".
template <class F>
const char* outcome_of(F compute) {
  static std::string outcome;
  outcome.clear();
  try {
    compute();
  } catch (const std::exception& error) {
    outcome = error.what();
  }
  return outcome.c_str();
}

}  // namespace lumina_kernels::cuda

// Computes what the Problem asks for, and returns what the host reports, or "".
extern "C" __attribute__((visibility("default"))) const char* mutant(
    const lumina_kernels::cuda::Problem* problem);
