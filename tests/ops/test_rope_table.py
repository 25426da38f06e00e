from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_equal_results,
    assert_same_in_float64,
    cast,
    raises,
    randn,
    run,
)

from lumina_kernels import rope3d, rope_table


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
    q, k = (torch.einsum("blij,blhj->blhi", matrices.expand(len(x), -1, -1, -1), x) for x in (q, k))
    return q, k


def eager(q, k, cos, sin, pairing):
    """Rounds after every operation, as models do."""
    pairs, dim = ((-1, 2), -1) if pairing == "interleaved" else ((2, -1), -2)

    def rotate(x):
        a, b = x.unflatten(-1, pairs).unbind(dim)
        return x * cos.unsqueeze(-2) + torch.stack((-b, a), dim).flatten(-2) * sin.unsqueeze(-2)

    return rotate(q), rotate(k)


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


def test_errors():
    good, op = make_inputs(), rope_table
    raises(ValueError, r"q must have shape \(B, L, H, K\)", op, good, q=randn(2, 5, 12))
    raises(ValueError, r"k must have shape \(2, 5, 2, 12\)", op, good, k=randn(1, 5, 2, 12))
    raises(TypeError, "k must have the dtype of q", op, good, k=good["k"].half())
    raises(ValueError, "even head_dim", op, good, q=randn(2, 5, 4, 3), k=None)
    raises(ValueError, r"\(5, 12\) or \(2, 5, 12\), got \(5, 6\)", op, good, cos=randn(5, 6))
    raises(ValueError, "sin must have shape", op, good, sin=randn(6, 12))
    raises(TypeError, "sin must be float16.*complex", op, good, sin=good["sin"] + 1j)
    raises(ValueError, "pairing must be one of interleaved, half", op, good, pairing="pairs")


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize(
    "shape, per_sample",
    (
        ((2, 5, 4, 2, 12), False),
        ((2, 5, 4, 2, 12), True),
        ((1, 1, 1, 1, 2), False),
        ((1, 13, 3, 1, 10), True),
        ((1, 3, 12, 5, 72), False),
        ((1, 1, 24, 24, 128), True),
        ((1, 1, 2, 1, 2062), False),  # CUDA: a head in two blocks
    ),
)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_accuracy(kernel, pairing, shape, per_sample, dtype):
    inputs = make_inputs(*shape, per_sample=per_sample) | {"pairing": pairing}
    assert_accurate(kernel, eager, inputs, dtype, wrt="qk")


@pytest.mark.parametrize("kernel", ("torch", *BACKENDS), indirect=True)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_queries_or_keys_alone(kernel, pairing):
    inputs = cast(make_inputs()) | {"pairing": pairing}
    both, alone = run(kernel, inputs, "qk"), run(kernel, inputs | {"k": None}, "q")
    assert_equal_results(alone, {name: both[name] for name in ("out 0", "dq")})
    for empty, other in (("k", "out 0"), ("q", "out 1")):
        if "triton" not in kernel.keywords.values():
            results = run(kernel, inputs | {empty: inputs[empty][:, :, :0]}, "qk")
            assert torch.equal(results[other], both[other])
            assert results[f"d{empty}"].numel() == 0


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_views(kernel, pairing):
    """Parts of one projection, aligned to 16 bytes, to 8 or not; tables in every layout."""
    kernel = partial(kernel, pairing=pairing)
    cos, sin = randn(2, 5, 16).half()
    tables = (
        (cos.mT.contiguous().mT, sin.mT.contiguous().mT),
        (torch.cat((cos, cos), -1)[:, :16], torch.cat((sin, sin), -1)[:, :16]),
        (torch.cat((cos[:, :1], cos), -1)[:, 1:], sin.expand(2, 5, 16)),
    )
    for start, width in ((0, 104), (4, 104), (3, 104), (0, 107)):
        q, k = randn(2, 5, width).half()[..., start : start + 96].split((64, 32), -1)
        q, k = q.unflatten(-1, (-1, 16)), k.unflatten(-1, (-1, 16))
        packed = kernel(q.contiguous(), k.contiguous(), cos, sin)
        for table in tables:
            for out, value in zip(kernel(q, k, *table), packed, strict=True):
                assert torch.equal(out, value)
