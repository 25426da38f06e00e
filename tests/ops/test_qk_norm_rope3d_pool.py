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
from test_context_drop import make_inputs as make_grid
from test_context_drop import with_loops
from test_qk_norm_rope3d import NORMS
from test_qk_norm_rope3d import eager as norm_eager
from test_qk_norm_rope3d import make_inputs as make_heads
from test_rope3d import fixed, make_table

from lumina_kernels import context_drop, qk_norm_rope3d
from lumina_kernels.ops.qk_norm_rope3d_pool import (
    qk_norm_rope3d_pool,
)


@pytest.fixture(params=BACKENDS)
def kernel(request):
    return partial(qk_norm_rope3d_pool, backend=request.param)


def make_inputs(B=2, grid=(1, 3, 3), H=4, G=2, K=12, norm=NORMS[0]):
    inputs = make_heads(B, grid[0] * grid[1] * grid[2], H, G, K, norm)
    return inputs | {"v": randn(*inputs["k"].shape)}


def make_rest(B=2, grid=(1, 3, 3), K=12, factor=2, masked=True, per_sample=False, norm=NORMS[0]):
    """What is not differentiated. With holes, and a window without a valid token."""
    L = grid[0] * grid[1] * grid[2]
    table = make_table(L, K, B, True) if per_sample else make_table(L, K)
    mask = make_grid(B, grid)["key_mask"].clone() if masked else None
    return table | {"grid": grid, "factor": factor, "key_mask": mask, "eps": 1e-3, "norm": norm}


def eager(
    q, k, v, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, grid, factor,
    key_mask=None, eps=1e-5, norm=NORMS[0],
):  # fmt: skip
    """Torch's own norms, complex multiplication, and one window at a time; rounded in between."""
    parameters, table = (q_weight, q_bias, k_weight, k_bias), (positions, inv_freq, axis)
    q, k = norm_eager(q, k, *parameters, *table, eps, norm)
    return q, *with_loops(k, v, grid, factor, key_mask)


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm):
    rest = make_rest(1, (1, 2, 3), 4, norm=norm)
    inputs = make_inputs(1, (1, 2, 3), 2, 1, 4, norm)
    present = {name: x.requires_grad_() for name, x in inputs.items() if x is not None}

    def op(*leaves):
        named = inputs | dict(zip(present, leaves, strict=True))
        return qk_norm_rope3d_pool(**named, **rest)[:3]

    assert torch.autograd.gradcheck(op, tuple(present.values()))


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("norm", NORMS)
def test_matches_torch(norm, masked):
    rest = make_rest(masked=masked, per_sample=masked, norm=norm)
    inputs = make_inputs(norm=norm)
    assert_same_in_float64(fixed(qk_norm_rope3d_pool, rest), fixed(eager, rest), inputs)


def test_is_its_two_ops():
    rest, inputs = make_rest(), make_inputs()
    window = {name: rest[name] for name in ("grid", "factor", "key_mask")}
    others = {name: x for name, x in rest.items() if name not in window}
    q, k = qk_norm_rope3d(**{n: x for n, x in inputs.items() if n != "v"}, **others)
    expected = q, *context_drop(k, inputs["v"], **window)
    for out, value in zip(qk_norm_rope3d_pool(**inputs, **rest), expected, strict=True):
        assert torch.equal(out, value)


def test_errors():
    good, op = make_inputs() | make_rest(), qk_norm_rope3d_pool
    raises(ValueError, "q must have shape", op, good, q=randn(2, 9, 48))
    raises(ValueError, r"v must have shape \(2, 9, 2, 12\)", op, good, v=randn(2, 9, 2, 10))
    raises(TypeError, "v must have the dtype of k", op, good, v=good["v"].float())
    raises(ValueError, "positions must have shape", op, good, positions=good["positions"][:4])
    raises(ValueError, r"q_weight must have shape \(48,\)", op, good, q_weight=randn(12))
    raises(ValueError, r"T \* H \* W = 9, got \(1, 3, 5\)", op, good, grid=(1, 3, 5))
    raises(ValueError, "factor must be at least 1, got 0", op, good, factor=0)
    raises(TypeError, "key_mask must be bool", op, good, key_mask=randn(2, 9))
    raises(ValueError, "norm must be one of layer_across_heads", op, good, norm="layer")


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("norm", NORMS)
def test_accuracy(kernel, norm, masked, dtype):
    rest = make_rest(masked=masked, per_sample=masked, norm=norm)
    assert_accurate(fixed(kernel, rest), fixed(eager, rest), make_inputs(norm=norm), dtype)


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize(
    "grid, H, G, K, factor",
    (
        ((2, 2, 3), 3, 1, 10, 3),
        ((3, 1, 2), 5, 12, 88, 1),
        ((1, 2, 5), 1, 1, 4, 7),
        ((1, 2, 3), 32, 8, 72, 2),  # Lumina-Next's; CUDA: two heads in a thread
        ((1, 1, 2), 30, 9, 128, 2),  # CUDA: four in a thread
    ),
)
@pytest.mark.parametrize("norm", NORMS[:2])
def test_accuracy_of_shapes(kernel, norm, grid, H, G, K, factor, dtype):
    rest = make_rest(1, grid, K, factor, norm=norm)
    fns = fixed(kernel, rest), fixed(eager, rest)
    assert_accurate(*fns, make_inputs(1, grid, H, G, K, norm), dtype)


def test_views(kernel):
    """Parts of one projection, aligned to 16 bytes or not."""
    fn, inputs = fixed(kernel, make_rest(K=16)), cast(make_inputs(K=16), torch.float16)
    for start in (0, 3):
        heads = randn(2, 9, 131).half()[..., start : start + 128].split((64, 32, 32), -1)
        views = dict(zip("qkv", (x.unflatten(-1, (-1, 16)) for x in heads), strict=True))
        packed = {name: x.contiguous() for name, x in views.items()}
        assert_equal_results(run(fn, inputs | views), run(fn, inputs | packed))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("H, G", ((0, 3), (3, 0)))
def test_one_without_heads(backend, H, G):
    rest, inputs = make_rest(norm=NORMS[1]), make_inputs(2, (1, 3, 3), H, G, 12, NORMS[1])
    fns = (fixed(partial(qk_norm_rope3d_pool, backend=name), rest) for name in (backend, "torch"))
    assert_accurate(*fns, inputs, torch.float16)


def test_parameters_are_optional(kernel):
    rest = make_rest()
    for left_out in (("q_weight", "k_bias"), ("q_weight", "q_bias", "k_weight", "k_bias")):
        inputs = make_inputs() | dict.fromkeys(left_out)
        assert_accurate(fixed(kernel, rest), fixed(eager, rest), inputs, torch.float32)


@pytest.mark.parametrize("eps", (1e-5, 0.0))
def test_masked_keys_do_not_matter(kernel, eps):
    rest, inputs = make_rest() | {"eps": eps}, cast(make_inputs())
    clean = run(fixed(kernel, rest), inputs)
    for garbage in (torch.nan, torch.inf):
        dirty = {name: inputs[name].clone() for name in "kv"}
        for tensor in dirty.values():
            tensor[~rest["key_mask"]] = garbage
        assert_equal_results(run(fixed(kernel, rest), inputs | dirty), clean)
    assert clean["dk"][~rest["key_mask"]].eq(0).all() and clean["out 1"][0, 0].eq(0).all()
    assert not any(value.isnan().any() for value in clean.values())


@pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA kernels are not here")
def test_a_gradient_too_wide_for_the_cuda_kernels_is_refused_before_the_forward():
    op = partial(qk_norm_rope3d_pool, backend="cuda", grid=(1, 1, 1), factor=2)
    wide = cast(make_inputs(1, (1, 1, 1), 130, 2, 64)) | make_table(1, 64)
    assert op(**wide)[0].isfinite().all()
    raises(NotImplementedError, "got 8320", op, wide, v=wide["v"].requires_grad_())
