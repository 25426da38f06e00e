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

from lumina_kernels import norm_modulate

OPTIONAL = ("weight", "bias", "scale", "shift")


def make_inputs(B=2, L=5, D=48, per_token=False):
    rows = (B, L, D) if per_token else (B, D)
    x = randn(B, L, D) + 0.5
    x[:1] *= 0.01  # eps shows
    return {
        "x": x,
        "weight": randn(D),
        "bias": randn(D),
        "scale": randn(*rows),
        "shift": randn(*rows),
    }


def eager(x, weight=None, bias=None, scale=None, shift=None, eps=1e-5, kind="rms"):
    """Rounds after every operation, as models do."""
    if kind == "layer":
        x = F.layer_norm(x, x.shape[-1:], None, None, eps)
    else:
        x = F.rms_norm(x, x.shape[-1:], None, eps)
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    if scale is not None:
        x = x * (1 + (scale[:, None] if scale.ndim == 2 else scale))
    if shift is not None:
        x = x + (shift[:, None] if shift.ndim == 2 else shift)
    return x


@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_gradcheck(kind):
    inputs = make_inputs(B=1, L=2, D=3)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: norm_modulate(*args, 1e-3, kind), leaves)


@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_matches_torch(kind, per_token):
    inputs = make_inputs(per_token=per_token)
    assert_same_in_float64(norm_modulate, eager, inputs | {"kind": kind, "eps": 1e-3})


@pytest.mark.parametrize("left_out", OPTIONAL)
def test_every_term_is_optional(left_out):
    inputs = make_inputs()
    del inputs[left_out]
    assert_same_in_float64(norm_modulate, eager, inputs)
    bare = {"x": inputs["x"]}
    assert_same_in_float64(norm_modulate, eager, bare)


def test_known_rows():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.float64)
    rms = norm_modulate(x, eps=0.5)  # mean square 12.5
    torch.testing.assert_close(rms, x / 13**0.5)
    layer = norm_modulate(x, eps=0.75, kind="layer")  # variance 0.25
    torch.testing.assert_close(layer, torch.tensor([[[-0.5, 0.5], [0.0, 0.0]]]).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_accuracy(kind, dtype):
    inputs = make_inputs(B=2, L=7, D=72)
    assert_accurate(
        lambda **kw: norm_modulate(**kw, kind=kind),
        lambda **kw: eager(**kw, kind=kind),
        inputs,
        dtype,
    )


def test_float32_parameters_of_a_bfloat16_model():
    inputs = make_inputs()
    mixed = {n: t.float() for n, t in inputs.items()} | {"x": inputs["x"].bfloat16()}
    out = norm_modulate(**mixed)
    exact = eager(**{n: t.double() for n, t in mixed.items()})
    assert out.dtype == torch.bfloat16
    assert_rounded_once(out, exact)


def test_strided():
    assert_strided_is_same(norm_modulate, make_inputs())
    D = 16
    x, table = randn(2, 5, D), randn(2, 4 * D)
    shift, scale = table.chunk(4, 1)[1:3]
    assert not scale.is_contiguous()
    expected = norm_modulate(x, scale=scale.contiguous(), shift=shift.contiguous())
    assert torch.equal(norm_modulate(x, scale=scale, shift=shift), expected)
    transposed = x.transpose(0, 1)
    assert torch.equal(norm_modulate(transposed), norm_modulate(x).transpose(0, 1))


def test_empty_batch():
    results = run(norm_modulate, make_inputs(B=0))
    assert results["out 0"].shape == (0, 5, 48)
    assert results["dweight"].eq(0).all()


@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_compile(kind):
    examples = [make_inputs(2, 5, 12), make_inputs(3, 7, 12), make_inputs(4, 9, 20)]
    assert_compiles(norm_modulate, *(e | {"kind": kind} for e in examples))


def test_errors():
    good = make_inputs()
    raises(
        ValueError,
        r"x must have shape \(B, L, D\), got \(5, 48\)",
        norm_modulate,
        good,
        x=randn(5, 48),
    )
    raises(
        TypeError, "x must be float16.*int64", norm_modulate, good, x=torch.ones(2, 5, 48).long()
    )
    raises(TypeError, "weight must be a tensor, got float", norm_modulate, good, weight=1.0)
    raises(
        ValueError,
        r"weight must have shape \(48,\), got \(47,\)",
        norm_modulate,
        good,
        weight=randn(47),
    )
    raises(ValueError, r"bias must have shape", norm_modulate, good, bias=randn(1, 48))
    raises(
        ValueError,
        r"scale must have shape \(2, 48\) or \(2, 5, 48\)",
        norm_modulate,
        good,
        scale=randn(2, 1, 48),
    )
    raises(ValueError, r"shift must have shape", norm_modulate, good, shift=randn(1, 48))
    raises(
        ValueError,
        "shift must be on .*, got meta",
        norm_modulate,
        good,
        shift=randn(2, 48).to("meta"),
    )
    raises(
        ValueError, "kind must be one of rms, layer, got 'batch'", norm_modulate, good, kind="batch"
    )
    raises(ValueError, "unknown", norm_modulate, good, backend="numpy")


@pytest.mark.parametrize("backend, dtype", KERNELS)
@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("B, L, D", ((2, 1, 8), (1, 5, 2), (2, 9, 100), (1, 6, 576), (2, 33, 144)))
def test_kernels_are_accurate(B, L, D, per_token, kind, backend, dtype):
    inputs = make_inputs(B, L, D, per_token) | {"kind": kind}
    assert_accurate(partial(norm_modulate, backend=backend), eager, inputs, dtype)


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
    "left_out",
    (("weight",), ("bias",), ("scale",), ("shift",), ("weight", "bias", "scale", "shift")),
)
def test_kernels_take_none(left_out, kind, backend):
    inputs = make_inputs() | {"kind": kind} | dict.fromkeys(left_out)
    assert_accurate(partial(norm_modulate, backend=backend), eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_per_token", (False, True))
def test_kernels_take_one_modulation_per_token_and_one_per_sample(scale_per_token, backend):
    inputs, per_token = make_inputs(), make_inputs(per_token=True)
    name = "scale" if scale_per_token else "shift"
    inputs |= {name: per_token[name]}
    assert_accurate(partial(norm_modulate, backend=backend), eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_keep_the_contract(backend):
    assert_kernel_contract(
        norm_modulate, make_inputs(2, 5, 12), make_inputs(3, 7, 12), backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_modulations_in_place(backend):
    inputs = make_inputs(D=16)
    views = randn(2, 32).chunk(2, 1)
    inputs |= dict(zip(("scale", "shift"), views, strict=True))
    fn = partial(norm_modulate, backend=backend)
    assert_accurate(fn, eager, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, L", ((0, 5), (2, 0)))
def test_kernels_take_nothing(B, L, backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(B, L).items()}
    results = run(partial(norm_modulate, backend=backend), inputs)
    assert_equal_results(results, run(partial(norm_modulate, backend="torch"), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_kernels_mix_dtypes(kind, backend):
    inputs = {name: tensor.half() for name, tensor in make_inputs().items()}
    inputs |= {name: inputs[name].float() for name in ("weight", "shift")} | {"kind": kind}
    expected = run(partial(norm_modulate, backend="torch"), inputs)
    for name, value in run(partial(norm_modulate, backend=backend), inputs).items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_read_any_rows(backend):
    inputs = {name: tensor.float() for name, tensor in make_inputs(4, 3, 12).items()}
    inputs["x"] = inputs["x"].transpose(0, 1)
    inputs["scale"] = inputs["scale"][:1].expand(3, 12)
    inputs["shift"] = inputs["shift"][:1, None].expand(3, 4, 12)
    packed = {name: tensor.contiguous() for name, tensor in inputs.items()}
    fn = partial(norm_modulate, backend=backend)
    assert_equal_results(run(fn, inputs), run(fn, packed))


def test_bits_do_not_depend_on_the_number_of_threads():
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(2, 70, 1040).items()}
    assert_threads_change_nothing(norm_modulate, inputs)
