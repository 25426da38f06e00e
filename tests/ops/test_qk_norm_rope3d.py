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
    assert_rounded_once,
    assert_same_in_float64,
    assert_strided_is_same,
    at_cpu_level,
    raises,
    randn,
    run,
)
from test_rope3d import fixed, make_table, with_complex_numbers
from torch.nn import functional as F

from lumina_kernels import qk_norm_rope3d
from lumina_kernels.ops.qk_norm_rope3d import qk_norm_rope3d_bwd, qk_norm_rope3d_fwd


@pytest.fixture(params=BACKENDS)
def kernel(request):
    return partial(qk_norm_rope3d, backend=request.param)


NORMS = ("layer_across_heads", "rms_per_head", "rms_across_heads")


def make_inputs(B=2, L=5, H=4, G=2, K=12, norm=NORMS[0]):
    q, k = randn(B, L, H, K) + 0.5, randn(B, L, G, K) + 0.5
    q[:1] *= 0.01  # eps shows
    q_width, k_width = (K, K) if norm == "rms_per_head" else (H * K, G * K)
    biased = norm == "layer_across_heads"
    return {
        "q": q,
        "k": k,
        "q_weight": randn(q_width),
        "q_bias": randn(q_width) if biased else None,
        "k_weight": randn(k_width),
        "k_bias": randn(k_width) if biased else None,
    }


def eager(
    q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, eps=1e-5, norm=NORMS[0]
):
    """Torch's own norms, rounded, then complex multiplication."""

    def normalise(x, weight, bias):
        if norm == "layer_across_heads":
            return F.layer_norm(x.flatten(2), (x.shape[2:].numel(),), weight, bias, eps).view_as(x)
        if norm == "rms_across_heads":
            return F.rms_norm(x.flatten(2), (x.shape[2:].numel(),), weight, eps).view_as(x)
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    q, k = normalise(q, q_weight, q_bias), normalise(k, k_weight, k_bias)
    return with_complex_numbers(q, k, positions, inv_freq, axis)


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm):
    table = make_table(2, 4) | {"eps": 1e-3, "norm": norm}
    inputs = make_inputs(2, 2, 2, 1, 4, norm)
    present = {
        name: tensor.requires_grad_() for name, tensor in inputs.items() if tensor is not None
    }

    def op(*leaves):
        return qk_norm_rope3d(**inputs | dict(zip(present, leaves, strict=True)), **table)

    assert torch.autograd.gradcheck(op, tuple(present.values()))


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("norm", NORMS)
def test_matches_torch(norm, per_sample):
    table = make_table(5, 12, 2, True) if per_sample else make_table(5, 12)
    table |= {"eps": 1e-3, "norm": norm}
    inputs = make_inputs(norm=norm)
    assert_same_in_float64(fixed(qk_norm_rope3d, table), fixed(eager, table), inputs)


@pytest.mark.parametrize("left_out", ("q_weight", "q_bias", "k_weight", "k_bias"))
def test_every_parameter_is_optional(left_out):
    table, inputs = make_table(5, 12), make_inputs() | {left_out: None}
    assert_same_in_float64(fixed(qk_norm_rope3d, table), fixed(eager, table), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_accuracy(norm, dtype):
    table = make_table(7, 72) | {"norm": norm}
    inputs = make_inputs(2, 7, 4, 2, 72, norm)
    assert_accurate(fixed(qk_norm_rope3d, table), fixed(eager, table), inputs, dtype)


def test_nothing_is_rounded_between_norm_and_rotation():
    table, inputs = make_table(7, 72), make_inputs(2, 7, 4, 2, 72)
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    exact = eager(**{name: tensor.double() for name, tensor in inputs.items()}, **table)
    for out, value in zip(qk_norm_rope3d(**inputs, **table), exact, strict=True):
        assert out.dtype == torch.bfloat16
        assert_rounded_once(out, value)


@pytest.mark.parametrize("norm", NORMS)
def test_strided(norm):
    table = make_table(5, 12) | {"norm": norm}
    assert_strided_is_same(fixed(qk_norm_rope3d, table), make_inputs(norm=norm))


def test_empty_batch():
    results = run(fixed(qk_norm_rope3d, make_table(5, 12)), make_inputs(B=0))
    assert results["out 0"].shape == (0, 5, 4, 12) and results["dq_bias"].eq(0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_compile(norm):
    sizes = ((5, 7, 4, 2, 16), (7, 9, 4, 2, 16), (9, 13, 8, 4, 20))
    examples = [make_inputs(*s, norm) | make_table(s[1], s[4]) | {"norm": norm} for s in sizes]
    assert_compiles(qk_norm_rope3d, *examples)


def test_errors():
    good, op = make_inputs() | make_table(5, 12), qk_norm_rope3d
    raises(ValueError, "q must have shape", op, good, q=randn(2, 5, 48))
    raises(ValueError, "positions must have shape", op, good, positions=good["positions"][:4])
    raises(TypeError, "k must have the dtype of q", op, good, k=good["k"].half())
    raises(
        ValueError, r"q_weight must have shape \(48,\), got \(12,\)", op, good, q_weight=randn(12)
    )
    raises(
        ValueError, r"k_weight must have shape \(24,\), got \(48,\)", op, good, k_weight=randn(48)
    )
    raises(ValueError, r"q_bias must have shape \(48,\)", op, good, q_bias=randn(47))
    raises(TypeError, "k_bias must be float16", op, good, k_bias=randn(24) > 0)
    raises(ValueError, "norm must be one of layer_across_heads, rms_per_head", op, good, norm="rms")
    raises(ValueError, "q_bias must be None for 'rms_across_heads'", op, good, norm=NORMS[2])
    per_head = make_inputs(norm="rms_per_head") | {"norm": "rms_per_head"}
    raises(
        ValueError,
        "k_bias must be None for 'rms_per_head'",
        op,
        good,
        **per_head | {"k_bias": randn(12)},
    )
    raises(
        ValueError,
        r"k_weight must have shape \(12,\)",
        op,
        good,
        **per_head | {"k_weight": randn(24)},
    )


def test_kernel_refuses_what_it_does_not_compute(kernel):
    good = make_inputs() | make_table(5, 12)
    raises(TypeError, "takes no float64", kernel, good)
    low = {name: tensor.float() for name, tensor in make_inputs().items()} | make_table(5, 12)
    raises(TypeError, "takes no float64", kernel, low, q_bias=good["q_bias"])
    learned = low["inv_freq"].requires_grad_()
    raises(NotImplementedError, "no gradient of inv_freq", kernel, low, inv_freq=learned)


def lower(inputs, dtype=torch.float32):
    """The floating inputs in `dtype`."""
    return {name: x if x is None else x.to(dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("kernel, dtype", KERNELS, indirect=["kernel"])
@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("norm", NORMS)
def test_kernel_accuracy(kernel, norm, per_sample, dtype):
    """Tokens of three programs, so that the weights' gradients have two stages."""
    table = make_table(5, 12, 2, True) if per_sample else make_table(5, 12)
    table |= {"norm": norm, "eps": 1e-3}
    inputs = make_inputs(norm=norm)
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, dtype)


@pytest.mark.parametrize("kernel, dtype", KERNELS, indirect=["kernel"])
@pytest.mark.parametrize("shape", ((1, 1, 1, 2, 4), (1, 13, 3, 1, 48), (1, 3, 12, 5, 88)))
@pytest.mark.parametrize("norm", NORMS)
def test_kernel_accuracy_of_shapes(kernel, norm, shape, dtype):
    """Heads and channels that are no powers of two, cut and padded."""
    table = make_table(shape[1], shape[-1]) | {"norm": norm}
    inputs = make_inputs(*shape, norm)
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, dtype)


@pytest.mark.parametrize(
    "left_out",
    (
        ("q_weight",),
        ("q_bias",),
        ("k_weight",),
        ("k_bias",),
        ("q_bias", "k_bias"),
        ("q_weight", "k_weight"),
        ("q_weight", "q_bias", "k_weight", "k_bias"),
    ),
)
def test_kernel_without_parameters(kernel, left_out):
    table, inputs = make_table(3, 12), make_inputs(L=3) | dict.fromkeys(left_out)
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, torch.float32)


def test_kernel_has_no_bias_in_an_rms_norm_without_weight(kernel):
    table = make_table(3, 12) | {"norm": "rms_per_head"}
    inputs = make_inputs(L=3, norm="rms_per_head") | {"q_weight": None, "k_weight": None}
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, torch.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_kernel_takes_views(kernel, norm):
    table = make_table(3, 12) | {"norm": norm}
    inputs = lower(make_inputs(L=3, norm=norm))
    assert_strided_is_same(fixed(kernel, table), inputs)
    fused = randn(2, 3, 80).float()[..., 4:]  # one projection of q, k and more
    q, k, _ = fused.split((48, 24, 4), -1)
    inputs |= {"q": q.unflatten(-1, (-1, 12)), "k": k.unflatten(-1, (-1, 12))}
    packed = inputs | {name: inputs[name].contiguous() for name in "qk"}
    assert_equal_results(run(fixed(kernel, table), inputs), run(fixed(kernel, table), packed))


def test_kernel_takes_weights_of_another_dtype(kernel):
    table, inputs = make_table(3, 12), make_inputs(L=3)
    mixed = lower(inputs) | {name: inputs[name].half() for name in "qk"}
    wide = lower(mixed)
    results = run(fixed(kernel, table), mixed)
    expected = run(fixed(kernel, table), wide)
    assert torch.equal(results["out 0"], expected["out 0"].half())
    assert results["dk"].dtype == torch.float16 and results["dq_bias"].dtype == torch.float32


def test_kernel_gives_the_same_bits_again(kernel):
    table, inputs = make_table(17, 12), lower(make_inputs(1, 17))
    assert_equal_results(run(fixed(kernel, table), inputs), run(fixed(kernel, table), inputs))


@pytest.mark.parametrize("shape", ((0, 5, 4, 2), (2, 0, 4, 2)))
def test_kernel_of_nothing(kernel, shape):
    inputs = lower(make_inputs(*shape)) | {"q_weight": None}
    results = run(fixed(kernel, make_table(shape[1], 12)), inputs)
    assert results["out 0"].shape == results["dq"].shape == (*shape[:3], 12)
    assert results["dk_weight"].eq(0).all() and results["dq_bias"].eq(0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_kernel_operators(kernel, norm):
    inputs = lower(make_inputs(1, 2, norm=norm))
    if norm == NORMS[2]:
        inputs["q_weight"] = None
    rest = (*make_table(2, 12).values(), 1e-5, norm, kernel.keywords["backend"])
    leaves = [x if x is None else x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(qk_norm_rope3d_fwd.overload, (*leaves, *rest))
    values = [x if x is None else x.detach() for x in leaves]
    torch.library.opcheck(qk_norm_rope3d_bwd.overload, (*values[:2], *values, *rest))


def test_kernel_compiles(kernel):
    examples = []
    for B, L, H, G, K in ((2, 5, 6, 4, 16), (4, 2, 3, 2, 20)):
        examples.append(lower(make_inputs(B, L, H, G, K)) | make_table(L, K))
    assert_compiles(lambda inv_freq, **kw: kernel(inv_freq=inv_freq.detach(), **kw), *examples)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_instruction_set_is_accurate(level, norm, dtype):
    with at_cpu_level(level):
        for shape in ((1, 2, 3, 1, 2), (1, 19, 3, 2, 40), (1, 3, 2, 1, 72)):
            kernel = partial(qk_norm_rope3d, backend="cpu")
            test_kernel_accuracy_of_shapes(kernel, norm, shape, dtype)


def test_a_learned_table_gets_its_gradient_where_no_kernel_was_asked_for():
    inputs = lower(make_inputs()) | make_table(5, 12)
    inputs["inv_freq"] = inputs["inv_freq"].float().requires_grad_()
    qk_norm_rope3d(**inputs)[0].square().sum().backward()
    assert inputs["inv_freq"].grad.abs().max() > 0
