from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
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
from test_rope3d import fixed, make_table, with_complex_numbers
from torch.nn import functional as F

from lumina_kernels import backend, qk_norm_rope3d
from lumina_kernels.ops.qk_norm_rope3d import refusals


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
    q, k = normalise(q, q_weight, q_bias, eps, norm), normalise(k, k_weight, k_bias, eps, norm)
    return with_complex_numbers(q, k, positions, inv_freq, axis)


def normalise(x, weight, bias, eps, norm):
    if norm == "layer_across_heads":
        return F.layer_norm(x.flatten(2), (x.shape[2:].numel(),), weight, bias, eps).view_as(x)
    if norm == "rms_across_heads":
        return F.rms_norm(x.flatten(2), (x.shape[2:].numel(),), weight, eps).view_as(x)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


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


def test_errors():
    good, op = make_inputs() | make_table(5, 12), qk_norm_rope3d
    raises(ValueError, "q must have shape", op, good, q=randn(2, 5, 48))
    raises(ValueError, "positions must have shape", op, good, positions=good["positions"][:4])
    raises(TypeError, "k must have the dtype of q", op, good, k=good["k"].half())
    raises(ValueError, r"q_weight .* \(48,\), got \(12,\)", op, good, q_weight=randn(12))
    raises(ValueError, r"k_weight .* \(24,\), got \(48,\)", op, good, k_weight=randn(48))
    raises(ValueError, r"q_bias must have shape \(48,\)", op, good, q_bias=randn(47))
    raises(TypeError, "k_bias must be float16", op, good, k_bias=randn(24) > 0)
    raises(ValueError, "norm must be one of layer_across_heads, rms_per_head", op, good, norm="rms")
    raises(ValueError, "q_bias must be None for 'rms_across_heads'", op, good, norm=NORMS[2])
    good |= make_inputs(norm=NORMS[1]) | {"norm": NORMS[1]}
    raises(ValueError, "k_bias must be None for 'rms_per_head'", op, good, k_bias=randn(12))
    raises(ValueError, r"k_weight must have shape \(12,\)", op, good, k_weight=randn(24))


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("norm", NORMS)
def test_accuracy(kernel, norm, per_sample, dtype):
    """Tokens of three programs, so that the weights' gradients have two stages."""
    table = make_table(5, 12, 2, True) if per_sample else make_table(5, 12)
    table |= {"norm": norm, "eps": 1e-3}
    inputs = make_inputs(norm=norm)
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, dtype)


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize(
    "shape",
    (
        (1, 1, 1, 2, 4),
        (1, 13, 3, 1, 10),  # CUDA: pieces of 8 and 2 channels; the second block is not full
        (1, 9, 8, 2, 48),
        (1, 3, 12, 5, 88),  # Triton: heads and channels padded to powers of two
        (1, 2, 34, 2, 96),  # CUDA: two heads in a thread of the backward, the last one alone
        (1, 1, 29, 40, 128),  # CUDA: four in a thread of the forward
    ),
)
@pytest.mark.parametrize("norm", NORMS)
def test_accuracy_of_shapes(kernel, norm, shape, dtype):
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
def test_every_parameter_is_optional_on_kernels(kernel, left_out):
    table, inputs = make_table(3, 12), make_inputs(L=3) | dict.fromkeys(left_out)
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, torch.float32)


@pytest.mark.parametrize("left_out", (("q_weight",), ("q_weight", "k_weight")))
@pytest.mark.parametrize("norm", NORMS[1:])
def test_rms_norms_without_weight(kernel, norm, left_out):
    table, inputs = make_table(3, 12) | {"norm": norm}, make_inputs(L=3, norm=norm)
    inputs |= dict.fromkeys(left_out)
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, torch.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_views(kernel, norm):
    """Parts of one projection, aligned to 16 bytes or not, and parameters that are not."""
    fn = fixed(kernel, make_table(3, 16) | {"norm": norm})
    inputs = cast(make_inputs(L=3, K=16, norm=norm), torch.float16)
    for start in (0, 3):
        projection = randn(2, 3, 112).half()[..., start : start + 96]
        heads = dict(zip("qk", projection.split((64, 32), -1), strict=True))
        views = {
            name: x if x is None else torch.cat((x.new_zeros(3), x))[3:]
            for name, x in inputs.items()
            if name not in "qk"
        }
        views |= {name: x.unflatten(-1, (-1, 16)) for name, x in heads.items()}
        packed = {name: x if x is None else x.contiguous().clone() for name, x in views.items()}
        assert_equal_results(run(fn, views), run(fn, packed))


@pytest.mark.parametrize("backend", NATIVE)
def test_many_tokens(backend):
    """More than four for each of the 512 blocks of the CUDA kernel."""
    table, inputs = make_table(2051, 2), make_inputs(1, 2051, 1, 1, 2)
    kernel = partial(qk_norm_rope3d, backend=backend)
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, torch.float32)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("H, G", ((0, 3), (3, 0)))
def test_one_without_heads(backend, H, G):
    table, inputs = make_table(3, 16) | {"norm": NORMS[1]}, make_inputs(2, 3, H, G, 16, NORMS[1])
    fns = (fixed(partial(qk_norm_rope3d, backend=name), table) for name in (backend, "torch"))
    assert_accurate(*fns, inputs, torch.float16)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA kernels are not here")
def test_rows_too_wide_for_the_cuda_kernels():
    """What the backward cannot hold is refused before the forward, where a gradient is required."""
    op = partial(qk_norm_rope3d, backend="cuda")
    most = cast(make_inputs(1, 1, 128, 1, 64)) | make_table(1, 64)
    q, _ = op(**most | {"q": most["q"].requires_grad_()})
    q.sum().backward()
    assert most["q"].grad.isfinite().all()
    wide = cast(make_inputs(1, 1, 1, 129, 64)) | make_table(1, 64)
    assert op(**wide)[1].isfinite().all()
    match = "at most 8192 values of a token, got 8320"
    raises(NotImplementedError, match, op, wide, k_weight=wide["k_weight"].requires_grad_())
    with torch.no_grad():
        op(**wide)
    wider = cast(make_inputs(1, 1, 257, 1, 64)) | make_table(1, 64)
    raises(RuntimeError, "16512 values.*at most 16384", op, wider)


def test_none_takes_the_definition_where_cuda_cannot_take_the_gradient(monkeypatch):
    monkeypatch.setattr(backend, "MISSING", {"triton": "not here", "cpu": "not here"})
    monkeypatch.setitem(backend.DEVICES, "cuda", DEVICE)
    q, k = torch.empty(1, 1, 72, 128, device=DEVICE), torch.empty(1, 1, 2, 128, device=DEVICE)

    def taken(q, k):
        return backend.resolve(None, ("cuda",), q, k, refused=refusals(q, k))

    assert taken(q, k) == "cuda"
    assert taken(q, k.requires_grad_()) == "torch"
    assert taken(q[:, :, :64], k) == "cuda"
    with torch.no_grad():
        assert taken(q, k) == "cuda"
