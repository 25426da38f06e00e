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
from test_context_drop import make_inputs as make_grid
from test_context_drop import with_loops
from test_qk_norm_rope3d import NORMS, lower
from test_qk_norm_rope3d import eager as norm_eager
from test_qk_norm_rope3d import make_inputs as make_heads
from test_rope3d import fixed, make_table

from lumina_kernels import context_drop, qk_norm_rope3d
from lumina_kernels.ops.qk_norm_rope3d_pool import (
    qk_norm_rope3d_pool,
    qk_norm_rope3d_pool_bwd,
    qk_norm_rope3d_pool_fwd,
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    rest, inputs = make_rest(), make_inputs()
    assert_accurate(fixed(qk_norm_rope3d_pool, rest), fixed(eager, rest), inputs, dtype)


def test_nothing_is_rounded_between_rotation_and_mean():
    rest, inputs = make_rest(), lower(make_inputs(), torch.bfloat16)
    exact = eager(**{name: tensor.double() for name, tensor in inputs.items()}, **rest)
    for out, value in zip(qk_norm_rope3d_pool(**inputs, **rest)[:3], exact[:3], strict=True):
        assert out.dtype == torch.bfloat16
        assert_rounded_once(out, value)


def test_strided():
    assert_strided_is_same(fixed(qk_norm_rope3d_pool, make_rest()), make_inputs())


def test_empty_batch():
    results = run(fixed(qk_norm_rope3d_pool, make_rest(0)), make_inputs(0))
    assert results["out 1"].shape == (0, 4, 2, 12) and results["dq_bias"].eq(0).all()


def test_compile():
    sizes = ((2, (1, 3, 4), 6, 8, 20), (3, (1, 5, 3), 2, 5, 24))
    examples = [make_inputs(*size) | make_rest(*size[:2], size[-1]) for size in sizes]
    assert_compiles(qk_norm_rope3d_pool, *examples)


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


def test_kernel_refuses_what_it_does_not_compute(kernel):
    raises(TypeError, "takes no float64", kernel, make_inputs() | make_rest())
    low = lower(make_inputs()) | make_rest()
    learned = low["positions"].float().requires_grad_()
    raises(NotImplementedError, "no gradient of positions", kernel, low, positions=learned)


@pytest.mark.parametrize("kernel, dtype", KERNELS, indirect=["kernel"])
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("norm", NORMS)
def test_kernel_accuracy(kernel, norm, masked, dtype):
    rest = make_rest(masked=masked, per_sample=masked, norm=norm)
    assert_accurate(fixed(kernel, rest), fixed(eager, rest), make_inputs(norm=norm), dtype)


@pytest.mark.parametrize("kernel, dtype", KERNELS, indirect=["kernel"])
@pytest.mark.parametrize(
    "grid, H, G, K, factor",
    (((2, 2, 3), 3, 1, 72, 3), ((3, 1, 2), 5, 12, 88, 1), ((1, 2, 5), 1, 1, 4, 7)),
)
def test_kernel_accuracy_of_shapes(kernel, grid, H, G, K, factor, dtype):
    rest = make_rest(1, grid, K, factor)
    fns = fixed(kernel, rest), fixed(eager, rest)
    assert_accurate(*fns, make_inputs(1, grid, H, G, K), dtype)


def test_kernel_without_parameters(kernel):
    rest = make_rest()
    for left_out in (("q_weight", "k_bias"), ("q_weight", "q_bias", "k_weight", "k_bias")):
        inputs = make_inputs() | dict.fromkeys(left_out)
        assert_accurate(fixed(kernel, rest), fixed(eager, rest), inputs, torch.float32)


@pytest.mark.parametrize("eps", (1e-5, 0.0))
def test_kernel_does_not_touch_what_is_masked(kernel, eps):
    rest, inputs = make_rest() | {"eps": eps}, lower(make_inputs())
    clean = run(fixed(kernel, rest), inputs)
    for garbage in (torch.nan, torch.inf):
        dirty = {name: inputs[name].clone() for name in "kv"}
        for tensor in dirty.values():
            tensor[~rest["key_mask"]] = garbage
        assert_equal_results(run(fixed(kernel, rest), inputs | dirty), clean)
    assert clean["dk"][~rest["key_mask"]].eq(0).all() and clean["out 1"][0, 0].eq(0).all()
    assert not any(value.isnan().any() for value in clean.values())


def test_kernel_takes_views(kernel):
    rest, inputs = make_rest(), lower(make_inputs())
    assert_strided_is_same(fixed(kernel, rest), inputs)
    q, k, v = randn(2, 9, 96).float().split((48, 24, 24), -1)  # one projection
    views = {"q": q.unflatten(-1, (4, 12)), "k": k.unflatten(-1, (2, 12))}
    inputs |= views | {"v": v.unflatten(-1, (2, 12))}
    packed = inputs | {name: inputs[name].contiguous() for name in "qkv"}
    assert_equal_results(run(fixed(kernel, rest), inputs), run(fixed(kernel, rest), packed))


def test_kernel_of_nothing(kernel):
    for B, grid in ((0, (1, 3, 4)), (2, (0, 3, 4))):
        inputs = lower(make_inputs(B, grid)) | {"k_bias": None}
        results = run(fixed(kernel, make_rest(B, grid, masked=False)), inputs)
        assert results["out 0"].shape == results["dq"].shape == inputs["q"].shape
        assert results["dv"].shape == inputs["v"].shape and results["dk_weight"].eq(0).all()


@pytest.mark.parametrize("masked", (False, True))
def test_kernel_operators(kernel, masked):
    grid = (1, 1, 3)
    q, k, *parameters, v = lower(make_inputs(1, grid)).values()
    parameters[1] = None
    *table, grid, factor, mask, eps, norm = make_rest(1, grid, masked=masked).values()
    rest = list(grid), factor, mask, eps, norm, kernel.keywords["backend"]
    q_out, small, _, _, counts = qk_norm_rope3d_pool_fwd(q, k, v, *parameters, *table, *rest)
    args = q_out, small, small, q, k, *parameters, *table, counts, *rest
    torch.library.opcheck(qk_norm_rope3d_pool_bwd.overload, args)
    leaves = (x if x is None else x.requires_grad_() for x in (q, k, v, *parameters))
    torch.library.opcheck(qk_norm_rope3d_pool_fwd.overload, (*leaves, *table, *rest))


def test_kernel_compiles(kernel):
    def fn(inv_freq, **kwargs):
        return kernel(inv_freq=inv_freq.detach(), **kwargs)

    sizes = ((4, (1, 2, 3), 5, 8, 20), (3, (1, 2, 2), 2, 4, 24))
    examples = (make_rest(*size[:2], size[-1]) for size in sizes)
    assert_compiles(
        fn, *(lower(make_inputs(*size)) | rest for size, rest in zip(sizes, examples, strict=True))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_instruction_set_is_accurate(level, norm, dtype):
    fn = partial(qk_norm_rope3d_pool, backend="cpu")
    with at_cpu_level(level):
        for grid, H, G, K, factor in (((1, 3, 3), 3, 1, 6, 2), ((2, 3, 5), 2, 3, 72, 2)):
            rest = make_rest(1, grid, K, factor, norm=norm)
            inputs = make_inputs(1, grid, H, G, K, norm)
            assert_accurate(fixed(fn, rest), fixed(eager, rest), inputs, dtype)
