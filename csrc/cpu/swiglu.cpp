// CPU kernels of swiglu: values one after another, whatever the shape.
#define LUMINA_FILE "cpu/swiglu.cpp"
#include "cpu/lib/levels.h"

// With the bodies of its loops in it: a call for each vector costs a tenth of the time.
#define LUMINA_FLAT __attribute__((flatten))

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// out = a / (1 + exp(-a)) * b
LUMINA_FLAT void swiglu_fwd(Row a, Row b, Row out, int64_t length) {
  for_vectors(length, [&](int64_t i, int64_t count) {
    const Vec x = load(a, i, count);
    store(out, i, x * load(b, i, count) / (1.f + exp(-x)), count);
  });
}

// With s = 1 / (1 + exp(-a)): da = dout * b * s * (1 + a * (1 - s)),  db = dout * a * s
LUMINA_FLAT void swiglu_bwd(Row dout, Row a, Row b, Row da, Row db, int64_t length) {
  for_vectors(length, [&](int64_t i, int64_t count) {
    const Vec x = load(a, i, count), d = load(dout, i, count);
    const Vec s = 1.f / (1.f + exp(-x));
    store(da, i, d * load(b, i, count) * (s * (1.f + x * (1.f - s))), count);
    store(db, i, d * (x * s), count);
  });
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

Tensor swiglu_fwd(const Tensor& a, const Tensor& b) {
  Tensor out = empty_as(a);
  const auto [rows, F] = flat_shape({a, b});
  const Rows xs = flat_rows(a, rows), ys = flat_rows(b, rows), outs = flat_rows(out, rows);
  parallel_pieces(rows, F, [&](int64_t row, int64_t i, int64_t count) {
    LUMINA_CALL(swiglu_fwd, xs(row) + i, ys(row) + i, outs(row) + i, count);
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dout, const Tensor& a, const Tensor& b) {
  Tensor da = empty_as(a), db = empty_as(b);
  const auto [rows, F] = flat_shape({dout, a, b});
  const Rows ds = flat_rows(dout, rows), xs = flat_rows(a, rows), ys = flat_rows(b, rows);
  const Rows dxs = flat_rows(da, rows), dys = flat_rows(db, rows);
  parallel_pieces(rows, F, [&](int64_t row, int64_t i, int64_t count) {
    LUMINA_CALL(swiglu_bwd, ds(row) + i, xs(row) + i, ys(row) + i, dxs(row) + i, dys(row) + i,
                count);
  });
  return {da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
