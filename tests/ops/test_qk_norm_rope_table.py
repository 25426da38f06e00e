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
from test_rope_table import FORMS, PAIRINGS, with_matrices
from test_rope_table import eager as rotate

from lumina_kernels import qk_norm_rope_table


@pytest.fixture(params=BACKENDS)
def kernel(request):
    return partial(qk_norm_rope_table, backend=request.param)


def make_inputs(B=2, L=5, H=4, G=2, K=12, norm=NORMS[0], table=None, channels=None):
    tables = {"cos": randn(*table or (L, K)), "sin": randn(*table or (L, K))}
    return make_normed(B, L, H, G, K, norm) | tables | {"channels": channels, "norm": norm}


def make_form(form, norm):
    channels, G, table = form
    return make_inputs(2, 3, 3, G, 20, norm, table, channels)


def two_steps(rotation):
    def fn(
        q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, pairing="interleaved", channels=None,
        eps=1e-5, norm=NORMS[0],
    ):  # fmt: skip
        q = normalise(q, q_weight, q_bias, eps, norm)
        k = normalise(k, k_weight, k_bias, eps, norm)
        return rotation(q, k, cos, sin, pairing, channels)

    return fn


eager = two_steps(rotate)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm, pairing):
    inputs = make_inputs(2, 2, 2, 1, 4, norm) | {"eps": 1e-3, "pairing": pairing}
    present = {n: x.requires_grad_() for n, x in inputs.items() if isinstance(x, torch.Tensor)}

    def op(*leaves):
        return qk_norm_rope_table(**inputs | dict(zip(present, leaves, strict=True)))

    assert torch.autograd.gradcheck(op, tuple(present.values()))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("norm", NORMS)
def test_matches_torch(norm, pairing, form):
    inputs = make_form(form, norm) | {"eps": 1e-3, "pairing": pairing}
    assert_same_in_float64(qk_norm_rope_table, two_steps(with_matrices), inputs)


def test_errors():
    good, op = make_inputs(), qk_norm_rope_table
    raises(ValueError, "q must have shape", op, good, q=randn(2, 5, 48))
    raises(TypeError, "k must have the dtype of q", op, good, k=good["k"].half())
    raises(TypeError, "k must be a tensor", op, good, k=None)
    raises(ValueError, "cos must have shape", op, good, cos=randn(4, 12))
    raises(ValueError, "channels must be even", op, good, channels=3)
    raises(ValueError, "pairing must be one of", op, good, pairing="pairs")
    raises(ValueError, "norm must be one of", op, good, norm="rms")
    raises(ValueError, r"q_weight .* \(48,\), got \(12,\)", op, good, q_weight=randn(12))
    raises(ValueError, "q_bias must be None for 'rms_across_heads'", op, good, norm=NORMS[2])


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize(
    "shape",
    (
        (1, 1, 1, 2, 4),
        (1, 13, 3, 1, 10),  # CUDA: pieces of 8 and 2 channels; the second block is not full
        (1, 9, 8, 2, 48),
        (1, 3, 12, 5, 88),  # Triton: heads and channels padded to powers of two
        (1, 2, 34, 2, 96),  # CUDA: two heads in a thread of the backward, the last one alone
    ),
)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("norm", NORMS)
def test_accuracy(kernel, norm, pairing, shape, dtype):
    inputs = make_inputs(*shape, norm) | {"pairing": pairing}
    assert_accurate(kernel, eager, inputs, dtype, wrt=DIFFERENTIABLE)


DIFFERENTIABLE = ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias")


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize("form", FORMS[2:], ids=str)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_accuracy_of_forms(kernel, pairing, form, dtype):
    norm = NORMS[FORMS.index(form) % 3]
    inputs = make_form(form, norm) | {"pairing": pairing, "eps": 1e-3}
    assert_accurate(kernel, eager, inputs, dtype, wrt=DIFFERENTIABLE)


@pytest.mark.parametrize("left_out", (DIFFERENTIABLE[2:], ("q_bias", "k_bias"), ("k_weight",)))
def test_every_parameter_is_optional_on_kernels(kernel, left_out):
    inputs = make_inputs(L=3) | dict.fromkeys(left_out)
    assert_accurate(kernel, eager, inputs, torch.float32, wrt=DIFFERENTIABLE)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_views(kernel, pairing):
    """Parts of one projection, aligned to 16 bytes or not, and tables as complex numbers."""
    freqs = torch.complex(randn(3, 7).float(), randn(3, 7).float())
    fn = partial(kernel, cos=freqs.real, sin=freqs.imag, pairing=pairing, channels=14)
    inputs = {n: x for n, x in make_normed(L=3, K=16, norm=NORMS[1]).items()}
    inputs = cast(inputs, torch.float16) | {"norm": NORMS[1]}
    for start in (0, 3):
        projection = randn(2, 3, 112).half()[..., start : start + 96]
        heads = dict(zip("qk", projection.split((64, 32), -1), strict=True))
        views = inputs | {name: x.unflatten(-1, (-1, 16)) for name, x in heads.items()}
        packed = views | {name: views[name].contiguous() for name in "qk"}
        plain = partial(fn, cos=freqs.real.contiguous(), sin=freqs.imag.contiguous())
        assert_equal_results(run(fn, views), run(plain, packed))


@pytest.mark.parametrize("backend", NATIVE)
def test_many_tokens(backend):
    """More than four for each of the 512 blocks of the CUDA kernel."""
    inputs = make_inputs(1, 2051, 1, 1, 2)
    kernel = partial(qk_norm_rope_table, backend=backend)
    assert_accurate(kernel, eager, inputs, torch.float32, wrt=DIFFERENTIABLE)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("H, G", ((0, 3), (3, 0)))
def test_one_without_heads(backend, pairing, H, G):
    inputs = make_inputs(2, 3, H, G, 16, NORMS[1]) | {"pairing": pairing}
    fns = (partial(qk_norm_rope_table, backend=name) for name in (backend, "torch"))
    assert_accurate(*fns, inputs, torch.float16, wrt=DIFFERENTIABLE)
