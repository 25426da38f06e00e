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

from lumina_kernels import gate_residual_norm


def make_inputs(B=2, L=5, D=48, per_token=False):
    rows = (B, L, D) if per_token else (B, D)
    y, residual = randn(B, L, D), randn(B, L, D)
    y[:1] *= 0.003  # eps shows in the first sample
    residual[:1] *= 0.003
    inputs = {"y": y, "residual": residual, "gate": randn(*rows), "weight": randn(D)}
    return inputs | {"bias": randn(D), "scale": randn(*rows), "shift": randn(*rows)}


def eager(
    y, residual, gate, weight=None, bias=None, scale=None, shift=None, eps=1e-6, kind="layer"
):
    """A block of Flux, with its roundings."""
    gate, scale, shift = (
        t[:, None] if t is not None and t.ndim == 2 else t for t in (gate, scale, shift)
    )
    new = residual + gate * y
    if kind == "layer":
        normed = F.layer_norm(new, new.shape[-1:], None, None, eps)
    else:
        normed = F.rms_norm(new, new.shape[-1:], None, eps)
    normed = normed if weight is None else normed * weight
    normed = normed if bias is None else normed + bias
    normed = normed if scale is None else normed * (1 + scale)
    return new, normed if shift is None else normed + shift


@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_gradcheck(kind):
    leaves = [tensor.requires_grad_() for tensor in make_inputs(B=1, L=2, D=3).values()]
    assert torch.autograd.gradcheck(lambda *a: gate_residual_norm(*a, 1e-3, kind), leaves)


@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_matches_torch(kind, per_token):
    inputs = make_inputs(per_token=per_token) | {"kind": kind, "eps": 1e-3}
    assert_same_in_float64(gate_residual_norm, eager, inputs)


def test_every_term_is_optional():
    inputs = make_inputs()
    for name in ("weight", "bias", "scale", "shift"):
        assert_same_in_float64(gate_residual_norm, eager, inputs | {name: None})
    bare = {name: inputs[name] for name in ("y", "residual", "gate")}
    assert_same_in_float64(gate_residual_norm, eager, bare)  # the defaults: "layer", 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_accuracy(kind, dtype):
    assert_accurate(
        lambda **kw: gate_residual_norm(**kw, kind=kind),
        lambda **kw: eager(**kw, kind=kind),
        make_inputs(B=2, L=7, D=72),
        dtype,
    )


def test_each_output_is_rounded_once():
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(L=64).items()}
    exact = eager(**{name: tensor.double() for name, tensor in inputs.items()})
    for out, value in zip(gate_residual_norm(**inputs), exact, strict=True):
        assert_rounded_once(out, value)


def test_the_residual_decides_the_dtype():
    inputs = {name: tensor.float() for name, tensor in make_inputs().items()}
    outs = gate_residual_norm(**inputs | {"y": inputs["y"].bfloat16()})
    assert [out.dtype for out in outs] == [torch.float32] * 2


def test_strided():
    assert_strided_is_same(gate_residual_norm, make_inputs())


def test_empty_batch():
    results = run(gate_residual_norm, make_inputs(B=0))
    assert results["out 0"].shape == results["out 1"].shape == (0, 5, 48)
    assert results["dbias"].eq(0).all()


def test_compile():
    assert_compiles(
        gate_residual_norm, make_inputs(2, 5, 12), make_inputs(3, 7, 12), make_inputs(4, 9, 20)
    )


def test_errors():
    good, op = make_inputs(), gate_residual_norm
    raises(ValueError, r"y must have shape \(B, L, D\)", op, good, y=randn(5, 48))
    raises(ValueError, "residual must have shape", op, good, residual=randn(1, 5, 48))
    raises(ValueError, "gate must have shape", op, good, gate=randn(48))
    raises(ValueError, "weight must have shape", op, good, weight=randn(1, 48))
    raises(ValueError, "bias must have shape", op, good, bias=randn(47))
    raises(ValueError, "scale must have shape", op, good, scale=randn(2, 1, 48))
    raises(TypeError, "shift must be float16", op, good, shift=torch.ones(2, 48).int())
    raises(ValueError, "kind must be one of rms, layer, got None", op, good, kind=None)


@pytest.mark.parametrize("backend, dtype", KERNELS)
@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("B, L, D", ((2, 1, 8), (1, 5, 2), (2, 9, 100), (1, 6, 576), (2, 33, 144)))
def test_kernels_are_accurate(B, L, D, per_token, kind, backend, dtype):
    inputs = make_inputs(B, L, D, per_token) | {"kind": kind}
    assert_accurate(partial(gate_residual_norm, backend=backend), eager, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_instruction_set_is_accurate(level, per_token, kind, dtype):
    with at_cpu_level(level):
        for D in (1, 33, 1040):  # 1040: three chunks of rows
            test_kernels_are_accurate(2, 70, D, per_token, kind, "cpu", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize(
    "left_out", (("weight",), ("scale",), ("weight", "bias", "scale", "shift"))
)
def test_kernels_take_none(left_out, kind, backend):
    inputs = make_inputs() | {"kind": kind} | dict.fromkeys(left_out)
    assert_accurate(partial(gate_residual_norm, backend=backend), eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_per_token", (False, True))
def test_kernels_take_one_modulation_per_token_and_one_per_sample(scale_per_token, backend):
    inputs, per_token = make_inputs(), make_inputs(per_token=True)
    name = "scale" if scale_per_token else "shift"
    inputs |= {name: per_token[name]}
    assert_accurate(partial(gate_residual_norm, backend=backend), eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_keep_the_contract(backend):
    assert_kernel_contract(
        gate_residual_norm, make_inputs(2, 5, 12), make_inputs(3, 7, 12), backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_modulations_in_place(backend):
    inputs = make_inputs(D=16)
    views = randn(2, 48).chunk(3, 1)
    inputs |= dict(zip(("gate", "scale", "shift"), views, strict=True))
    fn = partial(gate_residual_norm, backend=backend)
    assert_accurate(fn, eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, L", ((0, 5), (2, 0)))
def test_kernels_take_nothing(B, L, backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(B, L).items()}
    results = run(partial(gate_residual_norm, backend=backend), inputs)
    assert_equal_results(results, run(partial(gate_residual_norm, backend="torch"), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_mix_dtypes(backend):
    inputs = {name: tensor.half() for name, tensor in make_inputs().items()}
    inputs |= {name: inputs[name].float() for name in ("gate", "bias", "residual")}
    expected = run(partial(gate_residual_norm, backend="torch"), inputs)
    for name, value in run(partial(gate_residual_norm, backend=backend), inputs).items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_any_rows(backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(4, 3, 12).items()}
    inputs |= {name: inputs[name].transpose(0, 1) for name in ("y", "residual")}
    inputs["gate"] = inputs["gate"][:1, None].expand(3, 4, 12)
    inputs |= {name: inputs[name][:1].expand(3, 12) for name in ("scale", "shift")}
    packed = {name: tensor.contiguous() for name, tensor in inputs.items()}
    fn = partial(gate_residual_norm, backend=backend)
    assert_equal_results(run(fn, inputs), run(fn, packed))


def test_bits_do_not_depend_on_the_number_of_threads():
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(2, 70, 1040).items()}
    assert_threads_change_nothing(gate_residual_norm, inputs)
