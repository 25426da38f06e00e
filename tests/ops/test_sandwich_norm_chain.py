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
    assert_rounded_once,
    assert_same_in_float64,
    assert_strided_is_same,
    assert_threads_change_nothing,
    at_cpu_level,
    raises,
    randn,
    run,
)
from torch.nn import functional as F

from lumina_kernels import sandwich_norm_chain


def make_inputs(B=2, L=5, D=48, per_token=False):
    rows = (B, L, D) if per_token else (B, D)
    y = randn(B, L, D)
    y[:1] *= 0.01  # eps shows
    return {
        "y": y,
        "residual": randn(B, L, D),
        "weight": randn(D),
        "gate": randn(*rows),
        "next_weight": randn(D),
        "next_scale": randn(*rows),
    }


def eager(y, residual, weight, gate, next_weight, next_scale, eps=1e-5):
    """Two sub-layers of a model, with its roundings."""
    gate = gate[:, None] if gate.ndim == 2 else gate
    new = residual + torch.tanh(gate) * F.rms_norm(y, weight.shape, weight, eps)
    normed = F.rms_norm(new, weight.shape, next_weight, eps)
    if next_scale is not None:
        normed = normed * (1 + (next_scale[:, None] if next_scale.ndim == 2 else next_scale))
    return new, normed


def test_gradcheck():
    leaves = [tensor.requires_grad_() for tensor in make_inputs(B=1, L=2, D=3).values()]
    assert torch.autograd.gradcheck(lambda *args: sandwich_norm_chain(*args, 1e-3), leaves)


@pytest.mark.parametrize("per_token", (False, True))
def test_matches_torch(per_token):
    inputs = make_inputs(per_token=per_token) | {"eps": 1e-3}
    assert_same_in_float64(sandwich_norm_chain, eager, inputs)


@pytest.mark.parametrize("left_out", ("next_weight", "next_scale"))
def test_next_factors_are_optional(left_out):
    assert_same_in_float64(sandwich_norm_chain, eager, make_inputs() | {left_out: None})


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    assert_accurate(sandwich_norm_chain, eager, make_inputs(B=2, L=7, D=72), dtype)


def test_each_output_is_rounded_once():
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(L=64).items()}
    exact = eager(**{name: tensor.double() for name, tensor in inputs.items()})
    for out, value in zip(sandwich_norm_chain(**inputs), exact, strict=True):
        assert_rounded_once(out, value)


def test_the_residual_decides_the_dtype():
    inputs = {name: tensor.float() for name, tensor in make_inputs().items()}
    outs = sandwich_norm_chain(**inputs | {"y": inputs["y"].bfloat16()})
    assert [out.dtype for out in outs] == [torch.float32] * 2


def test_strided():
    assert_strided_is_same(sandwich_norm_chain, make_inputs())
    inputs = make_inputs(D=16)
    _, gate, next_scale, _ = randn(2, 64).chunk(4, 1)
    inputs |= {"gate": gate, "next_scale": next_scale}
    packed = inputs | {"gate": gate.contiguous(), "next_scale": next_scale.contiguous()}
    for out, expected in zip(
        sandwich_norm_chain(**inputs), sandwich_norm_chain(**packed), strict=True
    ):
        assert torch.equal(out, expected)


def test_empty_batch():
    results = run(sandwich_norm_chain, make_inputs(B=0))
    assert results["out 0"].shape == results["out 1"].shape == (0, 5, 48)
    assert results["dnext_weight"].eq(0).all()


def test_compile():
    assert_compiles(
        sandwich_norm_chain, make_inputs(2, 5, 12), make_inputs(3, 7, 12), make_inputs(4, 9, 20)
    )


def test_errors():
    good, chain = make_inputs(), sandwich_norm_chain
    raises(ValueError, r"y must have shape \(B, L, D\)", chain, good, y=randn(5, 48))
    raises(ValueError, "residual must have shape", chain, good, residual=randn(2, 1, 48))
    raises(ValueError, "weight must have shape", chain, good, weight=randn(2, 48))
    raises(ValueError, "gate must have shape", chain, good, gate=randn(1, 48))
    raises(ValueError, r"next_weight must have shape \(48,\)", chain, good, next_weight=randn(47))
    raises(ValueError, r"next_scale must have shape", chain, good, next_scale=randn(2, 5, 1))
    raises(TypeError, "next_scale must be float16", chain, good, next_scale=torch.ones(2, 48).int())


@pytest.mark.parametrize("backend, dtype", KERNELS)
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("B, L, D", ((2, 1, 8), (1, 5, 1), (2, 9, 100), (1, 6, 576), (2, 33, 144)))
def test_kernels_are_accurate(B, L, D, per_token, backend, dtype):
    inputs = make_inputs(B, L, D, per_token)
    assert_accurate(partial(sandwich_norm_chain, backend=backend), eager, inputs, dtype)


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
        sandwich_norm_chain, make_inputs(2, 5, 12), make_inputs(3, 7, 12), backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_modulations_in_place(backend):
    inputs = make_inputs(D=16)
    views = randn(2, 32).chunk(2, 1)
    inputs |= dict(zip(("gate", "next_scale"), views, strict=True))
    fn = partial(sandwich_norm_chain, backend=backend)
    assert_accurate(fn, eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, L", ((0, 5), (2, 0)))
def test_kernels_take_nothing(B, L, backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(B, L).items()}
    results = run(partial(sandwich_norm_chain, backend=backend), inputs)
    assert_equal_results(results, run(partial(sandwich_norm_chain, backend="torch"), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "left_out", (("next_weight",), ("next_scale",), ("next_weight", "next_scale"))
)
def test_kernels_take_none(left_out, backend):
    inputs = make_inputs() | dict.fromkeys(left_out)
    assert_accurate(partial(sandwich_norm_chain, backend=backend), eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_mix_dtypes(backend):
    inputs = {name: tensor.half() for name, tensor in make_inputs().items()}
    inputs |= {"weight": inputs["weight"].float(), "residual": inputs["residual"].float()}
    fn = partial(sandwich_norm_chain, backend=backend)
    expected = run(partial(sandwich_norm_chain, backend="torch"), inputs)
    for name, value in run(fn, inputs).items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_any_rows(backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(4, 3, 12).items()}
    inputs |= {name: inputs[name].transpose(0, 1) for name in ("y", "residual")}
    inputs["gate"] = inputs["gate"][:1, None].expand(3, 4, 12)
    inputs["next_scale"] = inputs["next_scale"][:1].expand(3, 12)
    packed = {name: tensor.contiguous() for name, tensor in inputs.items()}
    fn = partial(sandwich_norm_chain, backend=backend)
    assert_equal_results(run(fn, inputs), run(fn, packed))


def test_bits_do_not_depend_on_the_number_of_threads():
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(2, 70, 1040).items()}
    assert_threads_change_nothing(sandwich_norm_chain, inputs)
