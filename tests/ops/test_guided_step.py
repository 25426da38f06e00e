from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    IMPLEMENTATIONS,
    assert_as_accurate,
    assert_same_in_float64,
    cast,
    compiled,
    raises,
    randn,
)

from lumina_kernels import guided_step


def make_inputs(B=2, C=4, size=(3, 5), weight=4.0, dt=0.05, channels=3):
    x, v = randn(B, C, *size), randn(2 * B, C, *size)
    return {"x": x, "v": v, "weight": weight, "dt": dt, "channels": channels}


def eager(x, v, weight, dt, channels=None):
    """One sample and one channel at a time, with the roundings of every operation."""
    B, C = x.shape[:2]
    out = torch.empty_like(x)
    for b in range(B):
        for c in range(C):
            velocity = v[b, c]
            if channels is None or c < channels:
                velocity = weight * v[b, c] + (1 - weight) * v[B + b, c]
            out[b, c] = x[b, c] + dt * velocity
    return out


def test_gradcheck():
    x, v = randn(1, 2, 3).requires_grad_(), randn(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: guided_step(x, v, 4.0, 0.1, 1), (x, v))


@pytest.mark.parametrize("channels", (None, 0, 3, 4))
@pytest.mark.parametrize("size", ((), (7,), (3, 5), (2, 3, 5)))
def test_matches_loops(size, channels):
    inputs = make_inputs(size=size, channels=channels, dt=-0.3)
    assert_same_in_float64(guided_step, eager, inputs)


def test_known_numbers():
    x = torch.tensor([[1.0, 1.0]])
    v = torch.tensor([[3.0, 3.0], [1.0, 1.0]])  # conditional 3, unconditional 1
    assert torch.equal(guided_step(x, v, 4.0, 0.5), torch.tensor([[5.5, 5.5]]))  # u = 1 + 4 * 2
    assert torch.equal(guided_step(x, v, 4.0, 0.5, channels=1), torch.tensor([[5.5, 2.5]]))
    assert torch.equal(guided_step(x, v, 1.0, 0.5), torch.tensor([[2.5, 2.5]]))


def test_numbers_may_be_tensors():
    inputs = make_inputs()
    expected = guided_step(**inputs)
    numbers = {
        n: torch.tensor(inputs[n], dtype=torch.float64, device=DEVICE) for n in ("weight", "dt")
    }
    assert torch.equal(guided_step(**inputs | numbers), expected)
    x, v = inputs["x"].bfloat16(), inputs["v"].bfloat16()
    assert guided_step(x, v, **numbers).dtype == torch.bfloat16


def test_float32_state_of_a_bfloat16_model():
    inputs = make_inputs()
    x, v = inputs["x"].float(), inputs["v"].bfloat16()
    out = guided_step(x, v, 4.0, 0.1)
    assert out.dtype == torch.float32
    assert torch.equal(out, guided_step(x, v.float(), 4.0, 0.1))


def test_errors():
    good, op = make_inputs(), guided_step
    raises(TypeError, "x must be a tensor, got list", op, good, x=[1.0])
    raises(TypeError, "x must be float16.*got torch.int64", op, good, x=torch.ones(2, 4, 3).long())
    raises(ValueError, r"x must have shape \(B, C, ...\), got \(4,\)", op, good, x=randn(4))
    raises(ValueError, r"v .* \(4, 4, 3, 5\), got \(2, ", op, good, v=randn(2, 4, 3, 5))
    raises(ValueError, "v must have shape", op, good, v=randn(4, 8, 3, 5))
    raises(ValueError, "weight must be a number or a 0-d tensor", op, good, weight=randn(2))
    raises(ValueError, "dt must be a number or a 0-d tensor", op, good, dt=randn(1))
    raises(ValueError, "channels must be within 0..4, got 5", op, good, channels=5)
    raises(ValueError, "channels must be within 0..4, got -1", op, good, channels=-1)


@pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels", (None, 0, 3))
@pytest.mark.parametrize("size", ((), (7,), (19, 29)))
def test_accuracy(size, channels, backend, dtype):
    inputs = make_inputs(size=size, channels=channels, dt=-0.3)
    x, v = inputs["x"].to(dtype), inputs["v"].to(dtype)
    rest = {name: value for name, value in inputs.items() if name not in "xv"}
    out = guided_step(x, v, **rest, backend=backend)
    high = eager(x.double(), v.double(), **rest)
    assert_as_accurate("out", out, eager(x, v, **rest), high)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "weight, dt", ((4.0, 0.05), (torch.tensor(4.0), 0.05), (4.0, torch.tensor(0.05)))
)
def test_numbers_and_tensors_on_kernels(weight, dt, backend):
    x, v = randn(2, 4, 5).float(), randn(4, 4, 5).half()
    here = [n.to(DEVICE) if isinstance(n, torch.Tensor) else n for n in (weight, dt)]
    expected = guided_step(x, v, 4.0, 0.05, 3, backend="torch")
    for numbers in ((weight, dt), here):  # a tensor may be on the CPU, too
        torch.testing.assert_close(guided_step(x, v, *numbers, 3, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stride_between_elements(backend):
    x, v = randn(2, 4, 10).float()[..., ::2], randn(4, 4, 10).float()[..., ::2]
    out = guided_step(x, v, 4.0, 0.1, backend=backend)
    torch.testing.assert_close(out, guided_step(x, v, 4.0, 0.1, backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_for_any_step_size(backend):
    fn = partial(guided_step, backend=backend)
    fast = compiled(fn, [])
    for L, dt in ((5, 0.1), (7, 0.2), (7, 0.05)):
        inputs = cast(make_inputs(size=(L,), dt=dt))
        assert torch.equal(fast(**inputs), fn(**inputs))
