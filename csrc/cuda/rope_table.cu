// CUDA launchers of rope_table.
#include <type_traits>

#include "cuda/lib/rope_launch.h"
#include "cuda/rope_table.cuh"

namespace lumina_kernels::cuda {
namespace {

// Whether fours of rotated channels, and of those that follow, start at multiples of 4 values.
bool takes_fours(const Tensor& tensor, int64_t channels) {
  const int64_t dim = tensor.dim(), size = static_cast<int64_t>(tensor.element_size());
  bool aligned =
      reinterpret_cast<uintptr_t>(tensor.data_ptr()) % (4 * size) == 0 && channels % 8 == 0;
  for (int64_t i = 0; i + 1 < dim; ++i) {
    aligned &= tensor.size(i) == 1 || tensor.stride(i) % 4 == 0;
  }
  return aligned;
}

HeadsView heads_of(const Tensor& x, int64_t channels, bool half) {
  HeadsView heads = cuda::heads_of(x);
  if (half) heads.values.vectors = takes_fours(x, channels);
  return heads;
}

bool is_plain(const TablesView& tables, int64_t K) {
  const auto packed = [](const TableView& table) { return table.step == 1 && !table.is_double; };
  return tables.channels == K && !tables.pairs && !tables.per_head && packed(tables.cos) &&
         packed(tables.sin);
}

std::tuple<Tensor, Tensor> rotated(const Tensor& q, const OptionalTensor& k, const Tensor& cos,
                                   const Tensor& sin, const std::string& pairing, int64_t channels,
                                   bool backward) {
  Tensor q_out = empty_as(q), k_out = empty_as(k, q);
  if (q.numel() + k_out.numel() == 0) return {q_out, k_out};
  TablesView tables = tables_of(cos, sin, pairing, channels, backward);
  const bool half = tables.half;
  if (half) {
    tables.cos.values.vectors = takes_fours(cos, channels);
    tables.sin.values.vectors = takes_fours(sin, channels);
  }
  const int64_t tokens = q.size(0) * q.size(1), H = q.size(2), K = q.size(3);
  const int64_t G = k ? k->size(2) : 0, pieces = rope_table_pieces(K, channels, half);
  check_tokens(tokens);
  const Tensor qs = packed(q), ks = k ? packed(*k) : qs;
  const RowLayout layout = token_layout(H + G, pieces, kRopeTableThreads);
  const RopeTableParams p{.q = heads_of(qs, channels, half),
                          .k = heads_of(ks, channels, half),
                          .q_out = heads_of(q_out, channels, half),
                          .k_out = heads_of(k ? k_out : q_out, channels, half),
                          .tables = tables,
                          .layout = layout,
                          .tokens = tokens,
                          .L = q.size(1),
                          .H = static_cast<int>(H),
                          .G = static_cast<int>(G),
                          .K = static_cast<int>(K)};
  const LaunchConfig config = rope_table_config(layout, tokens, pieces);
  const auto launch = [&](auto plain) {
    if (half) {
      LUMINA_LAUNCH(q, config, (rope_table_kernel<plain(), true>), p);
    } else {
      LUMINA_LAUNCH(q, config, (rope_table_kernel<plain(), false>), p);
    }
  };
  if (is_plain(tables, K)) {
    launch(std::true_type());
  } else {
    launch(std::false_type());
  }
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> rope_table_fwd(const Tensor& q, const OptionalTensor& k,
                                          const Tensor& cos, const Tensor& sin,
                                          const std::string& pairing, int64_t channels) {
  return rotated(q, k, cos, sin, pairing, channels, false);
}

std::tuple<Tensor, Tensor> rope_table_bwd(const Tensor& dq_out, const OptionalTensor& dk_out,
                                          const Tensor& cos, const Tensor& sin,
                                          const std::string& pairing, int64_t channels) {
  return rotated(dq_out, dk_out, cos, sin, pairing, channels, true);
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("rope_table_fwd", TORCH_BOX(&rope_table_fwd));
  m.impl("rope_table_bwd", TORCH_BOX(&rope_table_bwd));
}

}  // namespace lumina_kernels::cuda
