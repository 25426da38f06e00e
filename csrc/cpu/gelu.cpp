// CPU kernels of gelu: elementwise, whatever the shape.
#define LUMINA_FILE "cpu/gelu.cpp"
#include "cpu/lib/levels.h"

// Inlines the bodies of the loops: calling one for each vector would cost a tenth of the time.
#define LUMINA_FLAT __attribute__((flatten))

#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// gelu(x) is x times `value`, of which `slope` is the derivative.
struct GateVec {
  Vec value, slope;
};

// (1 + erf(x / sqrt(2))) / 2. That of -|x| is exp(-x²/2) times a polynomial in 1 / (1 + 0.35 |x|),
// whose relative error is 3.2e-8 up to |x| = 14.6, beyond which the exponential is 0. In float32
// the gate errs by 2e-7 at most, and where it is small by about x²/2 roundings of itself.
LUMINA_INLINE GateVec exact_gate(Vec x) {
  const Vec bell = exp2_of_negative(x * x * -0.721347520f), u = 1.f / (1.f + 0.35f * abs(x));
  Vec p = broadcast(-0.0291592516f);
  p = p * u + 0.144037843f;
  p = p * u - 0.255853891f;
  p = p * u + 0.159337431f;
  p = p * u - 0.0232250635f;
  p = p * u + 0.105558112f;
  p = p * u + 0.119819805f;
  p = p * u + 0.139863729f;
  p = p * u + 0.139621288f;
  const Vec tail = bell * (p * u);
  return {x < 0.f ? tail : 1.f - tail, bell * 0.398942280f};
}

// (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)), and that of -z is exp(-2z) times as much.
LUMINA_INLINE GateVec tanh_gate(Vec x) {
  const Vec square = x * x;
  const Vec e = exp2_of_negative(-abs(x) * (2.3022082f + 0.10294324f * square));  // for base 2
  const Vec most = 1.f / (1.f + e);
  // Beyond 100 the slope is 0, of which an infinite square would make NaN.
  const Vec steep = 1.59576912f + 0.214064449f * min(broadcast(1e4f), square);
  return {x < 0.f ? e * most : most, e * most * most * steep};
}

// Calls f with one of the two.
template <class F>
LUMINA_INLINE void with_gate(bool tanh, const F& f) {
  if (tanh) {
    f([](Vec x) { return tanh_gate(x); });
  } else {
    f([](Vec x) { return exact_gate(x); });
  }
}

LUMINA_FLAT void gelu_fwd(bool tanh, Row x, Row out, int64_t length) {
  with_gate(tanh, [&](auto gate) {
    for_vectors(length, [&](int64_t i, int64_t count) {
      const Vec value = load(x, i, count);
      store(out, i, value * gate(value).value, count);
    });
  });
}

// dx = dout * (gate(x) + x * gate'(x))
LUMINA_FLAT void gelu_bwd(bool tanh, Row dout, Row x, Row dx, int64_t length) {
  with_gate(tanh, [&](auto gate) {
    for_vectors(length, [&](int64_t i, int64_t count) {
      const Vec value = load(x, i, count);
      const GateVec at = gate(value);
      store(dx, i, load(dout, i, count) * (at.value + value * at.slope), count);
    });
  });
}

}  // namespace
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {
namespace {

Tensor gelu_fwd(const Tensor& x, bool tanh) {
  Tensor out = empty_as(x);
  const auto [rows, F] = flat_shape({x});
  const Rows xs = flat_rows(x, rows), outs = flat_rows(out, rows);
  parallel_pieces(rows, F, [&](int64_t row, int64_t i, int64_t count) {
    LUMINA_CALL(gelu_fwd, tanh, xs(row) + i, outs(row) + i, count);
  });
  return out;
}

Tensor gelu_bwd(const Tensor& dout, const Tensor& x, bool tanh) {
  Tensor dx = empty_as(x);
  const auto [rows, F] = flat_shape({dout, x});
  const Rows ds = flat_rows(dout, rows), xs = flat_rows(x, rows), dxs = flat_rows(dx, rows);
  parallel_pieces(rows, F, [&](int64_t row, int64_t i, int64_t count) {
    LUMINA_CALL(gelu_bwd, tanh, ds(row) + i, xs(row) + i, dxs(row) + i, count);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
