import pytest
import torch
from common import (
    BACKENDS,
    CPU_LEVELS,
    DEVICE,
    DTYPES,
    KERNELS,
    assert_accurate,
    assert_as_accurate,
    assert_compiles,
    assert_same_in_float64,
    assert_strided_is_same,
    at_cpu_level,
    raises,
    randn,
    run,
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    assert_accurate(guided_step, eager, make_inputs(size=(8, 9)), dtype)


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


def test_strided():
    assert_strided_is_same(guided_step, make_inputs())
    x, v = randn(2, 4, 6), randn(4, 8, 6)[:, :4]  # learn_sigma: the second half is thrown away
    assert torch.equal(guided_step(x, v, 4.0, 0.1), guided_step(x, v.contiguous(), 4.0, 0.1))


def test_gradients_come_from_the_definition():
    inputs = make_inputs()
    inputs |= {name: inputs[name].float() for name in "xv"}
    for name in "xv":
        leaf = inputs[name].clone().requires_grad_()
        out = guided_step(**inputs | {name: leaf})
        assert torch.equal(out, guided_step(**inputs | {name: leaf}, backend="torch"))
        assert torch.autograd.grad(out.sum(), leaf)[0].shape == leaf.shape
    weight = torch.tensor(4.0, device=DEVICE, requires_grad=True)
    assert guided_step(**inputs | {"weight": weight}).requires_grad


def test_empty_batch():
    assert run(guided_step, make_inputs(B=0))["out 0"].shape == (0, 4, 3, 5)


@pytest.mark.parametrize("channels", (None, 3))
def test_compile(channels):
    steps = ((3, 4, (8, 5), 4.0, 0.1), (5, 4, (7, 6), 4.0, 0.2), (7, 9, (10, 11), 3.0, 0.3))
    assert_compiles(guided_step, *(make_inputs(*step, channels=channels) for step in steps))


def test_errors():
    good = make_inputs()
    raises(TypeError, "x must be a tensor, got list", guided_step, good, x=[1.0])
    raises(
        TypeError,
        "x must be float16.*got torch.int64",
        guided_step,
        good,
        x=torch.ones(2, 4, 3, 5).long(),
    )
    raises(
        ValueError, r"x must have shape \(B, C, ...\), got \(4,\)", guided_step, good, x=randn(4)
    )
    raises(
        ValueError,
        r"v must have shape \(4, 4, 3, 5\), got \(2, ",
        guided_step,
        good,
        v=randn(2, 4, 3, 5),
    )
    raises(ValueError, "v must have shape", guided_step, good, v=randn(4, 8, 3, 5))
    raises(
        ValueError, "weight must be a number or a 0-d tensor", guided_step, good, weight=randn(2)
    )
    raises(ValueError, "dt must be a number or a 0-d tensor", guided_step, good, dt=randn(1))
    raises(ValueError, "channels must be within 0..4, got 5", guided_step, good, channels=5)
    raises(ValueError, "channels must be within 0..4, got -1", guided_step, good, channels=-1)


@pytest.mark.parametrize("backend, dtype", KERNELS)
@pytest.mark.parametrize("channels", (None, 0, 3))
@pytest.mark.parametrize("size", ((), (7,), (19, 29)))
def test_kernels_are_accurate(size, channels, backend, dtype):
    inputs = make_inputs(size=size, channels=channels, dt=-0.3)
    x, v = inputs["x"].to(dtype), inputs["v"].to(dtype)
    rest = {name: value for name, value in inputs.items() if name not in "xv"}
    out = guided_step(x, v, **rest, backend=backend)
    high = eager(x.double(), v.double(), **rest)
    assert_as_accurate("out", out, eager(x, v, **rest), high)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_instruction_set_is_accurate(level, dtype):
    with at_cpu_level(level):
        for channels in (None, 0, 3):
            test_kernels_are_accurate((53, 31), channels, "cpu", dtype)  # two pieces of a sample


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "weight, dt", ((4.0, 0.05), (torch.tensor(4.0), 0.05), (4.0, torch.tensor(0.05)))
)
def test_kernels_take_numbers_and_tensors(weight, dt, backend):
    x, v = randn(2, 4, 5).float(), randn(4, 4, 5).half()
    here = [n.to(DEVICE) if isinstance(n, torch.Tensor) else n for n in (weight, dt)]
    expected = guided_step(x, v, 4.0, 0.05, 3, backend="torch")
    for numbers in ((weight, dt), here):  # a tensor may be on the CPU, too
        torch.testing.assert_close(guided_step(x, v, *numbers, 3, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_with_gaps(backend):
    x, v = randn(2, 4, 10).float()[..., ::2], randn(4, 4, 10).float()[..., ::2]
    torch.testing.assert_close(
        guided_step(x, v, 4.0, 0.1, backend=backend),
        guided_step(x, v, 4.0, 0.1, backend="torch"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_take_nothing(backend):
    x, v = randn(0, 4, 5).float(), randn(0, 4, 5).float()
    assert guided_step(x, v, 4.0, 0.1, backend=backend).shape == (0, 4, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_pass_opcheck_and_have_no_gradient(backend):
    op = torch.ops.lumina_kernels.guided_step_fwd
    x, v, weight = randn(2, 4, 5).float(), randn(4, 4, 5).float(), torch.tensor(4.0, device=DEVICE)
    torch.library.opcheck(op, (x, v, None, 4.0, None, 0.1, 3, backend))
    torch.library.opcheck(op, (x, v, weight, 0.0, weight, 0.0, 4, backend))
    with torch.no_grad():
        guided_step(x.requires_grad_(), v, 4.0, 0.1, backend=backend)
    numbers = {"weight": weight, "dt": 0.1, "backend": backend}
    for name in ("x", "v", "weight"):
        tensors = {"x": x.detach(), "v": v, "weight": weight}
        tensors[name] = tensors[name].clone().requires_grad_()
        with pytest.raises(NotImplementedError, match=f"computes no gradient of {name}"):
            guided_step(**numbers | tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_compile(backend):
    def step(x, v, weight, dt):
        return guided_step(x, v, weight, dt, 3, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    for B, L, dt in ((2, 5, 0.1), (3, 7, 0.2), (3, 7, 0.05)):
        x, v = randn(B, 4, L).float(), randn(2 * B, 4, L).float()
        assert torch.equal(compiled(x, v, 4.0, dt), step(x, v, 4.0, dt))
