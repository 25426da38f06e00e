from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    OP_LEVELS,
    assert_accurate,
    assert_same_in_float64,
    at_cpu_level,
    raises,
    randn,
    run,
)
from torch.nn import functional as F

from lumina_kernels import gelu

both_forms = pytest.mark.parametrize("approximate", ("none", "tanh"))
every_implementation = pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS)
# PyTorch's float32 overflows from 1.7e38 on, or in gradients from 1e19 on.
every_kernel = pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS[len(DTYPES) :])


def formula(x, approximate):
    """As the docstring has it, in a form that is accurate for negative x too."""
    if approximate == "none":
        return x * torch.erfc(-x / 2**0.5) / 2
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@both_forms
def test_gradcheck(approximate):
    x = (2 * randn(2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(partial(gelu, approximate=approximate), x)


@both_forms
def test_matches_the_formula(approximate):
    op, expected = (partial(f, approximate=approximate) for f in (gelu, formula))
    assert_same_in_float64(op, expected, {"x": 3 * randn(2, 5, 48)})


def test_any_shape():
    x = randn(2, 3, 4, 5, 6)
    assert torch.equal(gelu(x)[1, 2, 3], gelu(x[1, 2, 3]))


def test_errors():
    good = {"x": randn(2, 5)}
    raises(TypeError, "x must be a tensor, got NoneType", gelu, good, x=None)
    raises(TypeError, "x must be float16.*int64", gelu, good, x=torch.ones(2, 5).long())
    raises(ValueError, "one of none, tanh, got 'erf'", gelu, good, approximate="erf")


@every_implementation
@both_forms
@pytest.mark.parametrize("shape", ((), (7,), (2, 3, 5), (3, 1100), (2, 2, 1024)))
def test_accuracy(shape, approximate, backend, dtype):
    op = partial(gelu, approximate=approximate, backend=backend)
    assert_accurate(op, partial(F.gelu, approximate=approximate), {"x": 3 * randn(*shape)}, dtype)


@every_kernel
@both_forms
def test_over_the_whole_range(approximate, backend, dtype):
    """Every number of 16 bits, and as many of 32: within a rounding of the dtype and a few of
    float32, relative to x, or to 1 for the gradient."""
    if dtype == torch.float32:
        dense = torch.linspace(-16, 16, 40001)
        wide = torch.logspace(-44, 38, 10001)
        x = torch.cat((dense, wide, -wide)).to(DEVICE)
    else:
        x = torch.arange(-(2**15), 2**15, device=DEVICE).short().view(dtype)
        x = x[x.isfinite()]
    found = results(x, approximate, backend)
    expected = results(x.double(), approximate, "torch")
    rounding = torch.finfo(dtype).eps / 2 * (dtype != torch.float32)
    for name, least in (("out", x.double().abs()), ("dx", 1)):
        error = (found[name].double() - expected[name]).abs()
        allowed = rounding * expected[name].abs() + 3e-7 * least + torch.finfo(dtype).tiny
        assert error.le(allowed).all(), (name, x[error > allowed], error[error > allowed])


def results(x, approximate, backend):
    x = x.clone().requires_grad_()
    out = gelu(x, approximate, backend=backend)
    (dx,) = torch.autograd.grad(out.sum(), x)
    return {"out": out.detach(), "dx": dx}


@every_kernel
@both_forms
def test_what_is_large_or_not_finite(approximate, backend, dtype):
    """As the formulas have it: 0 times -inf is NaN, and so are gradients of infinities. A square
    that is infinite is no reason for one."""
    large = min(1e30, torch.finfo(dtype).max)
    x = torch.tensor([-torch.inf, -large, -100.0, 100.0, large, torch.inf, torch.nan])
    x = x.to(DEVICE, dtype)
    found = results(x, approximate, backend)
    nan = torch.full_like(x[:1], torch.nan)
    out = torch.cat((nan, x[1:].relu()))
    torch.testing.assert_close(found["out"], out, rtol=0, atol=0, equal_nan=True)
    dx = torch.cat((nan, (x[1:5] > 0).to(dtype), nan, nan))
    torch.testing.assert_close(found["dx"], dx, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", OP_LEVELS)
@both_forms
def test_small_gates_are_accurate_in_cpp(approximate, level):
    """Where 1 + erf(x / sqrt(2)) is a difference without right digits: the error of exp(-y) is y
    roundings of itself."""
    x = torch.linspace(-13, 0, 100_001)[:-1]
    with at_cpu_level(level):
        out = gelu(x, approximate, backend="cpu").double()
    exact = formula(x.double(), approximate)
    x, out, exact = (values[exact.abs() > 1e-37] for values in (x, out, exact))
    y = -(exact / x).log()
    assert ((out - exact).abs() <= 4e-7 * (1 + y / 2) * exact.abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_no_single_stride_reaches(backend):
    x = randn(2, 5, 64).float().chunk(2, -1)[1].transpose(0, 1)
    found, expected = (run(partial(gelu, backend=name), {"x": x}) for name in (backend, "torch"))
    torch.testing.assert_close(found, expected)
