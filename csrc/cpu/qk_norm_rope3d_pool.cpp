// CPU kernel of qk_norm_rope3d_pool: a window's keys are normalised, rotated and summed in the
// cache. The backward is that of qk_norm_rope3d, in which k reads its window's gradient, and for v
// that of context_drop.
#define LUMINA_FILE "cpu/qk_norm_rope3d_pool.cpp"
#include "cpu/lib/qk_norm.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

struct QkNormRope3dPoolFwd {
  Angles angles;
  Norm norm;
  Normed q, k;
  Windows windows;
  Mask mask;
  Rows v, q_out, k_out, v_out;
  bool* mask_out;
  float* counts;
  int64_t K;
};

}  // namespace lumina_kernels::cpu
#endif

#include "cpu/lib/levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// rotate(norm(q)) for the tokens of a window; the means of rotate(norm(k)) and of v over its valid
// tokens, 0 if there are none; and their number. For `samples` samples from `first` on, which share
// the angles.
void qk_norm_rope3d_pool_fwd(const QkNormRope3dPoolFwd& op, int64_t first, int64_t samples,
                             int64_t window) {
  const int64_t K = op.K, H = op.q.heads, G = op.k.heads, room = padded(std::max(H, G) * K);
  float* memory = scratch(rotation_size(K) + (2 + samples) * room);
  const Rotation rotation = rotation_in(memory, K);
  float *row = memory + rotation_size(K), *key = row + room, *all_sums = key + room;
  const Row key_row{reinterpret_cast<char*>(key), Dtype::kFloat};
  std::fill(all_sums, all_sums + samples * room, 0.f);
  const int64_t ahead = op.windows.ahead(window);
  op.windows.for_tokens(window, [&](int64_t l) {
    make_rotation(op.angles, first, l, rotation);
    for (int64_t b = first; b < first + samples; ++b) {
      if (ahead > 0) {
        prefetch(heads_at(op.q.x, b, l + ahead, H, K), op.q_out(b, l + ahead));
        prefetch(heads_at(op.k.x, b, l + ahead, G, K));
      }
      norm_rotate(heads_at(op.q.x, b, l, H, K), op.q.weight(), op.q.bias(), op.norm, rotation, K,
                  op.q_out(b, l), row);
      if (!op.mask(b, l)) continue;
      norm_rotate(heads_at(op.k.x, b, l, G, K), op.k.weight(), op.k.bias(), op.norm, rotation, K,
                  key_row, row);
      float* sums = all_sums + (b - first) * room;
      for (int64_t i = 0; i < G * K; i += kWidth) store(sums + i, load(sums + i) + load(key + i));
    }
  });
  std::vector<int64_t> tokens;
  for (int64_t b = first; b < first + samples; ++b) {
    tokens.clear();
    const int64_t number = find_valid(op.windows, op.mask, b, window, tokens);
    const float* sums = all_sums + (b - first) * room;
    const Vec size = broadcast(static_cast<float>(std::max<int64_t>(number, 1)));
    const Row k_out = op.k_out(b, window);
    for_whole_vectors(
        G * K, [&](int64_t i, int64_t count) { store(k_out, i, load(sums + i) / size, count); });
    window_mean(op.v, b, tokens.data(), number, op.windows.height(), G, K, op.v_out(b, window),
                row);
    op.mask_out[b * op.windows.count() + window] = number > 0;
    op.counts[b * op.windows.count() + window] = static_cast<float>(number);
  }
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope3d_pool_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const Tensor& positions, const Tensor& inv_freq, const Tensor& axis,
    const std::vector<int64_t>& grid, int64_t factor, const OptionalTensor& key_mask, double eps,
    const std::string& norm_name) {
  const Windows windows(grid, factor);
  const Norm norm(norm_name, eps);
  const int64_t B = k.size(0), H = q.size(2), G = k.size(2), K = k.size(3);
  const int64_t count = windows.count();
  Tensor q_out = empty_as(q), k_out = empty(k, {B, count, G, K}, k.scalar_type());
  Tensor v_out = empty(v, {B, count, G, K}, v.scalar_type());
  Tensor mask = empty(k, {B, count}, ScalarType::Bool);
  Tensor counts = empty(k, {B, count}, ScalarType::Float);
  const QkNormRope3dPoolFwd op{.angles = Angles(positions, inv_freq, axis),
                               .norm = norm,
                               .q = Normed(q, q_weight, q_bias, norm),
                               .k = Normed(k, k_weight, k_bias, norm),
                               .windows = windows,
                               .mask = Mask(key_mask),
                               .v = rows_of(v),
                               .q_out = rows_of(q_out),
                               .k_out = rows_of(k_out),
                               .v_out = rows_of(v_out),
                               .mask_out = static_cast<bool*>(mask.data_ptr()),
                               .counts = static_cast<float*>(counts.data_ptr()),
                               .K = K};
  const int64_t samples = op.angles.shared() ? B : 1;
  parallel_rows(
      B / std::max<int64_t>(samples, 1) * count, samples * 2 * windows.work((H + 2 * G) * K),
      [&](int64_t n) { LUMINA_CALL(qk_norm_rope3d_pool_fwd, op, n / count, samples, n % count); });
  return {q_out, k_out, v_out, mask, counts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope3d_pool_bwd(
    const Tensor& dq_out, const Tensor& dk_out, const Tensor& dv_out, const Tensor& q,
    const Tensor& k, const OptionalTensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& k_weight, const OptionalTensor& k_bias, const Tensor& positions,
    const Tensor& inv_freq, const Tensor& axis, const Tensor& counts,
    const std::vector<int64_t>& grid, int64_t factor, const OptionalTensor& key_mask, double eps,
    const std::string& norm) {
  const Tensor sizes = torch::stable::contiguous(counts);
  const Pool pool{Windows(grid, factor), Mask(key_mask),
                  static_cast<const float*>(sizes.data_ptr())};
  const Angles angles(positions, inv_freq, axis, -1);
  const auto [dq, dk, dq_weight, dq_bias, dk_weight, dk_bias] =
      qk_norm_bwd(dq_out, dk_out, q, k, q_weight, q_bias, k_weight, k_bias, &angles, nullptr,
                  Norm(norm, eps), &pool);
  const Tensor dv = window_mean_bwd(dv_out, sizes, pool.windows, pool.mask);
  return {dq, dk, dv, dq_weight, dq_bias, dk_weight, dk_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("qk_norm_rope3d_pool_fwd", TORCH_BOX(&qk_norm_rope3d_pool_fwd));
  m.impl("qk_norm_rope3d_pool_bwd", TORCH_BOX(&qk_norm_rope3d_pool_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
