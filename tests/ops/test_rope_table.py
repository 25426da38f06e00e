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
    assert_same_in_float64,
    assert_strided_is_same,
    at_cpu_level,
    raises,
    randn,
    run,
)

from lumina_kernels import rope3d, rope_table
from lumina_kernels.ops.rope_table import rope_table_bwd, rope_table_fwd


@pytest.fixture(params=BACKENDS)
def kernel(request):
    return partial(rope_table, backend=request.param)


PAIRINGS = ("interleaved", "half")


def make_inputs(B=2, L=5, H=4, G=2, K=12, per_sample=False):
    """Tables with unrelated entries: a table of K/2 columns could not stand in for them."""
    table = (B, L, K) if per_sample else (L, K)
    inputs = {"q": randn(B, L, H, K), "k": randn(B, L, G, K)}
    return inputs | {"cos": randn(*table), "sin": randn(*table)}


def with_matrices(q, k, cos, sin, pairing="interleaved"):
    """Every token's rotation as a (K, K) matrix, the pairs found one by one."""
    K = q.shape[-1]
    rot = torch.zeros(K, K, dtype=q.dtype, device=q.device)
    for j in range(K // 2):
        a, b = (2 * j, 2 * j + 1) if pairing == "interleaved" else (j, j + K // 2)
        rot[a, b], rot[b, a] = -1, 1
    matrices = torch.diag_embed(cos) + sin[..., None] * rot  # ([B,] L, K, K)
    matrices = matrices if matrices.ndim == 4 else matrices[None]
    q_out, k_out = (
        torch.einsum("blij,blhj->blhi", matrices.expand(len(x), -1, -1, -1), x) for x in (q, k)
    )
    return q_out, k_out


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradcheck(pairing):
    leaves = [tensor.requires_grad_() for tensor in make_inputs(1, 2, 2, 1, 4).values()]
    assert torch.autograd.gradcheck(lambda *args: rope_table(*args, pairing), leaves)


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_matches_matrices(pairing, per_sample):
    inputs = make_inputs(per_sample=per_sample) | {"pairing": pairing}
    assert_same_in_float64(rope_table, with_matrices, inputs)


def test_known_pairs():
    q = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    interleaved, _ = rope_table(q, q, zero, one)
    half, _ = rope_table(q, q, zero, one, "half")
    assert interleaved.flatten().tolist() == [-2, 1, -4, 3]
    assert half.flatten().tolist() == [-3, -4, 1, 2]


def test_is_rope3d_with_a_table():
    inputs = make_inputs()
    positions = torch.arange(15).view(5, 3).to(inputs["q"].device)
    inv_freq, axis = randn(6), torch.tensor([0, 1, 2, 2, 1, 0], device=positions.device)
    angle = (positions[:, axis] * inv_freq).repeat_interleave(2, -1)
    expected = rope3d(inputs["q"], inputs["k"], positions, inv_freq, axis)
    outs = rope_table(inputs["q"], inputs["k"], angle.cos(), angle.sin())
    for out, value in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, value)


def test_queries_alone():
    inputs = make_inputs()
    q, k = rope_table(**inputs | {"k": None})
    assert k is None
    assert torch.equal(q, rope_table(**inputs)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_accuracy(pairing, dtype):
    def eager(q, k, cos, sin):
        def rotate(x):
            if pairing == "half":
                rot = torch.cat((-x[..., 36:], x[..., :36]), -1)
            else:
                rot = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * cos[:, None] + rot * sin[:, None]

        return rotate(q), rotate(k)

    inputs = make_inputs(2, 7, 4, 2, 72)
    assert_accurate(lambda **kw: rope_table(**kw, pairing=pairing), eager, inputs, dtype)


def test_float32_tables_of_a_bfloat16_model():
    inputs = {name: tensor.float() for name, tensor in make_inputs().items()}
    low = inputs | {"q": inputs["q"].bfloat16(), "k": inputs["k"].bfloat16()}
    q, k = rope_table(**low)
    expected = rope_table(**low | {"q": low["q"].float(), "k": low["k"].float()})
    assert torch.equal(q, expected[0].bfloat16()) and torch.equal(k, expected[1].bfloat16())


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_strided(pairing):
    assert_strided_is_same(rope_table, make_inputs() | {"pairing": pairing})


def test_empty_batch():
    results = run(rope_table, make_inputs(B=0))
    assert results["out 0"].shape == (0, 5, 4, 12) and results["dcos"].eq(0).all()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_compile(pairing):
    sizes = ((3, 5, 4, 2, 12), (7, 6, 4, 2, 12), (9, 11, 8, 4, 20))
    assert_compiles(rope_table, *(make_inputs(*size) | {"pairing": pairing} for size in sizes))


def test_errors():
    good = make_inputs()
    raises(ValueError, r"q must have shape \(B, L, H, K\)", rope_table, good, q=randn(2, 5, 12))
    raises(ValueError, r"k must have shape \(2, 5, 2, 12\)", rope_table, good, k=randn(1, 5, 2, 12))
    raises(TypeError, "k must have the dtype of q", rope_table, good, k=good["k"].half())
    raises(ValueError, "even head_dim", rope_table, good, q=randn(2, 5, 4, 3), k=None)
    raises(
        ValueError,
        r"cos must have shape \(5, 12\) or \(2, 5, 12\), got \(5, 6\)",
        rope_table,
        good,
        cos=randn(5, 6),
    )
    raises(ValueError, "sin must have shape", rope_table, good, sin=randn(6, 12))
    raises(TypeError, "sin must be float16.*complex", rope_table, good, sin=good["sin"] + 1j)
    raises(
        ValueError, "pairing must be one of interleaved, half", rope_table, good, pairing="pairs"
    )


def test_kernel_refuses_what_it_does_not_compute(kernel):
    good = make_inputs()
    raises(TypeError, "takes no float64", kernel, good)
    low = {name: tensor.float() for name, tensor in good.items()}
    learned = low["sin"].requires_grad_()
    raises(NotImplementedError, "no gradient of sin", kernel, low, sin=learned)
    with torch.no_grad():
        assert torch.equal(kernel(**low | {"sin": learned})[0], kernel(**low)[0])


def heads_and_table(*args, dtype=None, **kwargs):
    """The inputs, q and k in `dtype`, and tables in float32."""
    inputs = make_inputs(*args, **kwargs)
    heads = {name: inputs[name] if dtype is None else inputs[name].to(dtype) for name in "qk"}
    return heads, {name: inputs[name].float() for name in ("cos", "sin")}


def with_table(fn, table, pairing):
    """fn of q and k, the table held and in the dtype of q where fn does not take another."""

    def held(q, k):
        cos, sin = (x.double() if q.dtype == torch.float64 else x for x in table.values())
        return fn(q=q, k=k, cos=cos, sin=sin, pairing=pairing)

    return held


def rounding_matrices(q, k, cos, sin, pairing):
    q, k = with_matrices(q, k, cos.to(q.dtype), sin.to(q.dtype), pairing)
    return q, k


@pytest.mark.parametrize("kernel, dtype", KERNELS, indirect=["kernel"])
@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize(
    "shape", ((2, 5, 4, 2, 12), (1, 1, 1, 1, 2), (1, 13, 3, 1, 48), (1, 3, 12, 5, 72))
)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_kernel_accuracy(kernel, pairing, shape, per_sample, dtype):
    inputs, table = heads_and_table(*shape, per_sample=per_sample)
    fns = (with_table(fn, table, pairing) for fn in (kernel, rounding_matrices))
    assert_accurate(*fns, inputs, dtype)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_kernel_of_queries_alone(kernel, pairing):
    inputs, table = heads_and_table(dtype=torch.float32)
    table |= {"pairing": pairing}
    both = run(lambda q, k: kernel(q, k, **table), inputs)
    alone = run(lambda q: kernel(q, None, **table)[0], {"q": inputs["q"]})
    assert_equal_results(alone, {name: both[name] for name in alone})
    assert kernel(inputs["q"], None, **table)[1] is None


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_kernel_takes_views(kernel, pairing):
    inputs, table = heads_and_table(dtype=torch.float32)
    table |= {"pairing": pairing}
    assert_strided_is_same(lambda **kw: kernel(**kw, **table), inputs)
    q, k, _ = randn(2, 5, 80).float().split((48, 24, 8), -1)  # one projection of q, k and more
    q, k = q.unflatten(-1, (-1, 12)), k.unflatten(-1, (-1, 12))
    views = table | {name: table[name].mT.contiguous().mT for name in ("cos", "sin")}
    gaps = table | {name: torch.cat((table[name],) * 2, -1)[:, :12] for name in ("cos", "sin")}
    expected = kernel(q.contiguous(), k.contiguous(), **table)
    for other in (views, gaps):
        for out, value in zip(kernel(q, k, **other), expected, strict=True):
            assert torch.equal(out, value)


@pytest.mark.parametrize("shape", ((0, 5, 4, 2), (2, 0, 4, 2)))
def test_kernel_of_nothing(kernel, shape):
    inputs, table = heads_and_table(*shape, dtype=torch.float32)
    results = run(lambda **kw: kernel(**kw, **table), inputs)
    assert results["out 0"].shape == results["dq"].shape == (*shape[:3], 12)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_kernel_operators(kernel, pairing):
    inputs, table = heads_and_table(1, 2, dtype=torch.float16)
    q, k = inputs.values()
    for key in (k, None):
        args = (q, key, *table.values(), pairing, kernel.keywords["backend"])
        torch.library.opcheck(rope_table_bwd.overload, args)
        leaves = (x if x is None else x.detach().requires_grad_() for x in args[:2])
        torch.library.opcheck(rope_table_fwd.overload, (*leaves, *args[2:]))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_kernel_compiles(kernel, pairing):
    def fn(cos, sin, **inputs):
        return kernel(cos=cos.detach(), sin=sin.detach(), pairing=pairing, **inputs)

    examples = []
    for size in ((2, 5, 6, 4, 16), (4, 2, 3, 2, 20)):
        inputs, table = heads_and_table(*size, dtype=torch.float16)
        examples.append(inputs | table)
    assert_compiles(fn, *examples)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_instruction_set_is_accurate(level, pairing, dtype):
    with at_cpu_level(level):
        for shape in ((1, 2, 1, 2, 2), (1, 3, 2, 1, 24), (2, 3, 3, 1, 36), (1, 3, 5, 2, 88)):
            kernel = partial(rope_table, backend="cpu")
            test_kernel_accuracy(kernel, pairing, shape, False, dtype)


@pytest.mark.parametrize("name", ("cos", "sin"))
def test_a_learned_table_gets_its_gradient_where_no_kernel_was_asked_for(name):
    inputs = {key: tensor.float() for key, tensor in make_inputs().items()}
    inputs[name].requires_grad_()
    rope_table(**inputs)[0].square().sum().backward()
    assert inputs[name].grad.abs().max() > 0
