from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    IMPLEMENTATIONS,
    NATIVE,
    assert_accurate,
    assert_equal_results,
    assert_same_in_float64,
    cast,
    raises,
    randn,
    run,
)
from test_qk_norm_rope3d import NORMS, normalise
from test_qk_norm_rope3d import make_inputs as make_normed
from test_rope_table import PAIRINGS, with_matrices
from test_rope_table import eager as rotate

from lumina_kernels import qk_norm_rope_table

LAYER, PER_HEAD, ACROSS = NORMS
INTERLEAVED, HALF = PAIRINGS


@pytest.fixture(params=BACKENDS)
def kernel(request):
    return partial(qk_norm_rope_table, backend=request.param)


# Norm, pairing, sizes B L H G K (no k if G is None), rotated channels, shape of the tables.
CASES = (
    (LAYER, INTERLEAVED, (1, 5, 3, 1, 10), None, (5, 10)),  # CUDA: pieces of 8 and 2 channels
    (LAYER, HALF, (1, 2, 34, 2, 96), None, (1, 2, 96)),  # CUDA: two heads in a backward's thread
    (LAYER, HALF, (2, 1, 3, 2, 20), 14, (2, 1, 7)),
    (LAYER, INTERLEAVED, (2, 2, 3, 3, 20), 16, (2, 2, 3, 8)),
    (PER_HEAD, INTERLEAVED, (1, 2, 12, 5, 88), None, (2, 44)),  # Triton: padded to powers of two
    (PER_HEAD, HALF, (1, 1, 40, 29, 128), None, (1, 128)),  # CUDA: four in a forward's thread
    (PER_HEAD, HALF, (2, 1, 3, 3, 20), 16, (1, 1, 3, 16)),
    (PER_HEAD, HALF, (1, 1, 1, 2, 4), 2, (1, 1, 1, 1)),
    (ACROSS, INTERLEAVED, (2, 2, 3, None, 20), 14, (2, 2, 14)),
    (ACROSS, HALF, (2, 2, 3, None, 20), None, (1, 2, 3, 10)),
    (ACROSS, INTERLEAVED, (1, 2, 3, 3, 20), None, (1, 2, 3, 20)),
)
PARAMETERS = ("q_weight", "q_bias", "k_weight", "k_bias")
DIFFERENTIABLE = ("q", "k", *PARAMETERS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def make_inputs(norm=LAYER, pairing=INTERLEAVED, sizes=(2, 2, 2, 1, 4), channels=None, table=None):
    B, L, H, G, K = sizes
    cos, sin = randn(2, *table or (L, K))
    options = {"pairing": pairing, "channels": channels, "eps": 1e-3, "norm": norm}
    inputs = make_normed(B, L, H, G or 1, K, norm) | {"cos": cos, "sin": sin} | options
    return inputs | dict.fromkeys(("k", "k_weight", "k_bias") if G is None else ())


def two_steps(rotation):
    """Torch's own norms, rounded, then a rotation."""

    def fn(
        q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, pairing=INTERLEAVED, channels=None,
        eps=1e-5, norm=LAYER,
    ):  # fmt: skip
        q = normalise(q, q_weight, q_bias, eps, norm)
        keys = q if k is None else normalise(k, k_weight, k_bias, eps, norm)
        q_out, k_out = rotation(q, keys, cos, sin, pairing, channels)
        return q_out, None if k is None else k_out

    return fn


eager = two_steps(rotate)


@pytest.mark.parametrize("norm, pairing", ((LAYER, HALF), (PER_HEAD, INTERLEAVED), (ACROSS, HALF)))
def test_gradcheck(norm, pairing):
    """By the tables, too."""
    inputs = make_inputs(norm, pairing)
    present = {n: x.requires_grad_() for n, x in inputs.items() if isinstance(x, torch.Tensor)}

    def op(*leaves):
        return qk_norm_rope_table(**inputs | dict(zip(present, leaves, strict=True)))

    assert torch.autograd.gradcheck(op, tuple(present.values()))


@every_case
def test_matches_matrices(case):
    assert_same_in_float64(qk_norm_rope_table, two_steps(with_matrices), make_inputs(*case))


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@every_case
def test_accuracy(kernel, case, dtype):
    assert_accurate(kernel, eager, make_inputs(*case), dtype, wrt=DIFFERENTIABLE)


@pytest.mark.parametrize("left_out", (PARAMETERS, ("q_bias", "k_weight")))
def test_every_parameter_is_optional_on_kernels(kernel, left_out):
    inputs = make_inputs() | dict.fromkeys(left_out)
    assert_accurate(kernel, eager, inputs, torch.float32, wrt=DIFFERENTIABLE)


@pytest.mark.parametrize("start, pairing", ((0, INTERLEAVED), (3, HALF)))
def test_views(kernel, start, pairing):
    """Parts of one projection, aligned to 16 bytes or not, and parts of complex numbers."""
    inputs = cast(make_inputs(PER_HEAD, pairing, (1, 2, 4, 2, 16), 14, (2, 7)), torch.float16)
    projection = randn(1, 2, 112).half()[..., start : start + 96]
    q, k = (x.unflatten(-1, (-1, 16)) for x in projection.split((64, 32), -1))
    freqs = torch.complex(inputs["cos"].float(), inputs["sin"].float())
    views = inputs | {"q": q, "k": k, "cos": freqs.real, "sin": freqs.imag}
    packed = {n: x.contiguous() if isinstance(x, torch.Tensor) else x for n, x in views.items()}
    found, expected = (run(kernel, each, DIFFERENTIABLE) for each in (views, packed))
    assert_equal_results(found, expected)


@pytest.mark.parametrize("backend", NATIVE)
def test_many_tokens(backend):
    """More than four for each of the 512 blocks of the CUDA kernel."""
    kernel, inputs = (
        partial(qk_norm_rope_table, backend=backend),
        make_inputs(sizes=(1, 2051, 1, 1, 2)),
    )
    assert_accurate(kernel, eager, inputs, torch.float32, wrt=DIFFERENTIABLE)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("H, G, pairing", ((0, 3, HALF), (3, 0, INTERLEAVED)))
def test_one_without_heads(backend, H, G, pairing):
    inputs = make_inputs(PER_HEAD, pairing, (2, 3, H, 1, 16))
    inputs["k"] = randn(2, 3, G, 16)
    fns = (partial(qk_norm_rope_table, backend=name) for name in (backend, "torch"))
    assert_accurate(*fns, inputs, torch.float16, wrt=DIFFERENTIABLE)


def test_errors():
    good, op = make_inputs(), qk_norm_rope_table
    raises(ValueError, "q must have shape", op, good, q=randn(2, 2, 8))
    raises(TypeError, "k must have the dtype of q", op, good, k=good["k"].half())
    raises(ValueError, "k_weight and k_bias must be None without k", op, good, k=None)
    raises(ValueError, "cos must have shape", op, good, cos=randn(3, 4))
    raises(ValueError, "channels must be even", op, good, channels=3)
    raises(ValueError, "pairing must be one of", op, good, pairing="pairs")
    raises(ValueError, "norm must be one of", op, good, norm="rms")
    raises(ValueError, r"q_weight .* \(8,\), got \(4,\)", op, good, q_weight=randn(4))
    raises(ValueError, "q_bias must be None for 'rms_across_heads'", op, good, norm=ACROSS)
