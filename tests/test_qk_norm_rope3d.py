import pytest
import torch
from common import (
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_rounded_once,
    assert_same_in_float64,
    assert_strided_is_same,
    raises,
    randn,
    run,
)
from test_rope3d import fixed, make_table, with_complex_numbers
from torch.nn import functional as F

from lumina_kernels import qk_norm_rope3d

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
    raises(ValueError, "'triton' is not there yet", op, good, backend="triton")
