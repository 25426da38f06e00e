// CUDA launchers of rope_table.
#include "cuda/lib/rope_launch.h"
#include "cuda/rope_table.cuh"

namespace lumina_kernels::cuda {
namespace {

// Whether halves of K/2 values start at multiples of 4 values.
bool takes_fours(const Tensor& tensor) {
  const int64_t dim = tensor.dim(), size = static_cast<int64_t>(tensor.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % (4 * size) == 0 &&
                 tensor.size(dim - 1) % 8 == 0;
  for (int64_t i = 0; i + 1 < dim; ++i) {
    aligned &= tensor.size(i) == 1 || tensor.stride(i) % 4 == 0;
  }
  return aligned;
}

HeadsView heads_of(const Tensor& x, bool half) {
  HeadsView heads = cuda::heads_of(x);
  if (half) heads.values.vectors = takes_fours(x);
  return heads;
}

// A table (L, K) or (B, L, K).
RowsView table_of(const Tensor& table, bool half) {
  const int64_t dim = table.dim();
  RowsView rows{values_of(table), dim == 2 ? 0 : table.stride(0), table.stride(dim - 2), true};
  if (half) rows.values.vectors = takes_fours(table);
  return rows;
}

std::tuple<Tensor, Tensor> rotated(const Tensor& q, const OptionalTensor& k, const Tensor& cos,
                                   const Tensor& sin, const std::string& pairing, bool backward) {
  Tensor q_out = empty_as(q), k_out = empty_as(k, q);
  if (q.numel() + k_out.numel() == 0) return {q_out, k_out};
  const bool half = pairing == "half";
  STD_TORCH_CHECK(half || pairing == "interleaved", "unknown pairing ", pairing);
  const int64_t tokens = q.size(0) * q.size(1), H = q.size(2), K = q.size(3);
  const int64_t G = k ? k->size(2) : 0, pieces = rope_table_pieces(K, half);
  check_tokens(tokens);
  const Tensor qs = packed(q), ks = k ? packed(*k) : qs, cosines = packed(cos), sines = packed(sin);
  const RowLayout layout = token_layout(H + G, pieces, kRopeTableThreads);
  const RopeTableParams p{.q = heads_of(qs, half),
                          .k = heads_of(ks, half),
                          .q_out = heads_of(q_out, half),
                          .k_out = heads_of(k ? k_out : q_out, half),
                          .cos = table_of(cosines, half),
                          .sin = table_of(sines, half),
                          .layout = layout,
                          .tokens = tokens,
                          .L = q.size(1),
                          .H = static_cast<int>(H),
                          .G = static_cast<int>(G),
                          .K = static_cast<int>(K),
                          .half = half,
                          .backward = backward};
  LUMINA_LAUNCH(q, rope_table_config(layout, tokens, pieces), rope_table_kernel, p);
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> rope_table_fwd(const Tensor& q, const OptionalTensor& k,
                                          const Tensor& cos, const Tensor& sin,
                                          const std::string& pairing) {
  return rotated(q, k, cos, sin, pairing, false);
}

std::tuple<Tensor, Tensor> rope_table_bwd(const Tensor& dq_out, const OptionalTensor& dk_out,
                                          const Tensor& cos, const Tensor& sin,
                                          const std::string& pairing) {
  return rotated(dq_out, dk_out, cos, sin, pairing, true);
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("rope_table_fwd", TORCH_BOX(&rope_table_fwd));
  m.impl("rope_table_bwd", TORCH_BOX(&rope_table_bwd));
}

}  // namespace lumina_kernels::cuda
