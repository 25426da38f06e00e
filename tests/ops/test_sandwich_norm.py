from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    CPU_LEVELS,
    DTYPES,
    KERNELS,
    assert_accurate,
    assert_compiles,
    assert_equal_results,
    assert_kernel_contract,
    assert_same_in_float64,
    assert_strided_is_same,
    assert_threads_change_nothing,
    at_cpu_level,
    raises,
    randn,
    run,
)
from torch.nn import functional as F

from lumina_kernels import sandwich_norm


def make_inputs(B=2, L=5, D=48, per_token=False):
    y = randn(B, L, D)
    y[:1] *= 0.01  # eps shows
    gate = randn(B, L, D) if per_token else randn(B, D)
    return {"y": y, "residual": randn(B, L, D), "weight": randn(D), "gate": gate}


def eager(y, residual, weight, gate, eps=1e-5):
    """Rounds after the norm, the tanh, the product and the sum, as models do."""
    gate = gate[:, None] if gate.ndim == 2 else gate
    return residual + torch.tanh(gate) * F.rms_norm(y, weight.shape, weight, eps)


def test_gradcheck():
    leaves = [tensor.requires_grad_() for tensor in make_inputs(B=2, L=2, D=3).values()]
    assert torch.autograd.gradcheck(lambda *args: sandwich_norm(*args, eps=1e-3), leaves)


@pytest.mark.parametrize("per_token", (False, True))
def test_matches_torch(per_token):
    inputs = make_inputs(per_token=per_token) | {"eps": 1e-3}
    assert_same_in_float64(sandwich_norm, eager, inputs)


def test_known_row():
    y = torch.tensor([[[3.0, -4.0]]])
    out = sandwich_norm(
        y, torch.ones_like(y), torch.tensor([2.0, 1.0]), torch.tensor([[50.0, 0.0]]), 3.5
    )
    torch.testing.assert_close(
        out, torch.tensor([[[2.5, 1.0]]])
    )  # 1 + 1 * 3/4 * 2; the gate is shut


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    assert_accurate(sandwich_norm, eager, make_inputs(B=2, L=7, D=72), dtype)


def test_the_residual_decides_the_dtype():
    inputs = {name: tensor.float() for name, tensor in make_inputs().items()}
    y = inputs["y"].bfloat16()
    out = sandwich_norm(**inputs | {"y": y})
    assert out.dtype == torch.float32
    assert torch.equal(out, sandwich_norm(**inputs | {"y": y.float()}))
    residual = inputs["residual"].bfloat16()
    assert sandwich_norm(**inputs | {"residual": residual}).dtype == torch.bfloat16


def test_strided():
    assert_strided_is_same(sandwich_norm, make_inputs())
    inputs = make_inputs(D=16)
    inputs["gate"] = randn(2, 64).chunk(4, 1)[1]
    packed = inputs | {"gate": inputs["gate"].contiguous()}
    assert torch.equal(sandwich_norm(**inputs), sandwich_norm(**packed))


def test_empty_batch():
    results = run(sandwich_norm, make_inputs(B=0))
    assert results["out 0"].shape == (0, 5, 48)
    assert results["dweight"].eq(0).all()


def test_compile():
    assert_compiles(
        sandwich_norm, make_inputs(2, 5, 12), make_inputs(3, 7, 12), make_inputs(4, 9, 20)
    )


def test_errors():
    good = make_inputs()
    raises(ValueError, r"y must have shape \(B, L, D\)", sandwich_norm, good, y=randn(5, 48))
    raises(
        ValueError,
        r"residual must have shape \(2, 5, 48\), got",
        sandwich_norm,
        good,
        residual=randn(2, 6, 48),
    )
    raises(
        ValueError,
        r"weight must have shape \(48,\), got \(1,\)",
        sandwich_norm,
        good,
        weight=randn(1),
    )
    raises(TypeError, "weight must be a tensor, got NoneType", sandwich_norm, good, weight=None)
    raises(
        ValueError,
        r"gate must have shape \(2, 48\) or \(2, 5, 48\)",
        sandwich_norm,
        good,
        gate=randn(48),
    )
    raises(TypeError, "gate must be float16.*bool", sandwich_norm, good, gate=randn(2, 48) > 0)


@pytest.mark.parametrize("backend, dtype", KERNELS)
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("B, L, D", ((2, 1, 8), (1, 5, 1), (2, 9, 100), (1, 6, 576), (2, 33, 144)))
def test_kernels_are_accurate(B, L, D, per_token, backend, dtype):
    inputs = make_inputs(B, L, D, per_token)
    assert_accurate(partial(sandwich_norm, backend=backend), eager, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_instruction_set_is_accurate(level, per_token, dtype):
    with at_cpu_level(level):
        for D in (1, 33, 1040):  # 1040: three chunks of rows
            test_kernels_are_accurate(2, 70, D, per_token, "cpu", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_keep_the_contract(backend):
    assert_kernel_contract(
        sandwich_norm, make_inputs(2, 5, 12), make_inputs(3, 7, 12), backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_modulations_in_place(backend):
    inputs = make_inputs(D=16)
    inputs["gate"] = randn(2, 64).chunk(4, 1)[1]
    fn = partial(sandwich_norm, backend=backend)
    assert_accurate(fn, eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, L", ((0, 5), (2, 0)))
def test_kernels_take_nothing(B, L, backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(B, L).items()}
    results = run(partial(sandwich_norm, backend=backend), inputs)
    assert_equal_results(results, run(partial(sandwich_norm, backend="torch"), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_mix_dtypes(backend):
    inputs = {name: tensor.half() for name, tensor in make_inputs().items()}
    inputs |= {name: inputs[name].float() for name in ("weight", "residual")}
    expected = run(partial(sandwich_norm, backend="torch"), inputs)
    for name, value in run(partial(sandwich_norm, backend=backend), inputs).items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_any_rows(backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(4, 3, 12).items()}
    inputs |= {name: inputs[name].transpose(0, 1) for name in ("y", "residual")}
    inputs["gate"] = inputs["gate"][:1, None].expand(3, 4, 12)
    packed = {name: tensor.contiguous() for name, tensor in inputs.items()}
    fn = partial(sandwich_norm, backend=backend)
    assert_equal_results(run(fn, inputs), run(fn, packed))


def test_bits_do_not_depend_on_the_number_of_threads():
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(2, 70, 1040).items()}
    assert_threads_change_nothing(sandwich_norm, inputs)
