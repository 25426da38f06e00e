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


# Channels of 20 that are rotated, heads of k, shape of the tables for B = 2, L = 3, H = 3.
FORMS = (
    (20, 2, (3, 10)),
    (20, 2, (1, 3, 10)),
    (14, 2, (2, 3, 14)),
    (14, 2, (3, 7)),
    (16, 1, (2, 3, 1, 8)),
    (16, 3, (2, 3, 3, 8)),
    (20, 3, (1, 3, 3, 20)),
    (2, 3, (1, 3, 3, 1)),
)


def make_form(channels, G, table):
    inputs = {"q": randn(2, 3, 3, 20), "k": randn(2, 3, G, 20)}
    return inputs | {"cos": randn(*table), "sin": randn(*table), "channels": channels}


def with_matrices(q, k, cos, sin, pairing="interleaved", channels=None):
    """The rotation of every head as a (K, K) matrix, the pairs found one by one."""
    B, L, H, K = q.shape
    C = K if channels is None else channels
    cos, sin = (z if z.ndim == 4 else z.unsqueeze(-2) for z in (cos, sin))  # ([B,] L, H, W)
    matrices = torch.eye(K, dtype=q.dtype, device=q.device).repeat(B, L, H, 1, 1)
    for j in range(C // 2):
        a, b = (2 * j, 2 * j + 1) if pairing == "interleaved" else (j, j + C // 2)
        of_a, of_b = (j, j) if cos.shape[-1] < C else (a, b)
        matrices[..., a, a], matrices[..., a, b] = cos[..., of_a], -sin[..., of_a]
        matrices[..., b, b], matrices[..., b, a] = cos[..., of_b], sin[..., of_b]
    return tuple(torch.einsum("blhij,blhj->blhi", matrices[:, :, : x.shape[2]], x) for x in (q, k))


def eager(q, k, cos, sin, pairing, channels=None):
    """Rounds after every operation, as models do."""
    C = q.shape[-1] if channels is None else channels
    pairs, dim = ((-1, 2), -1) if pairing == "interleaved" else ((2, -1), -2)
    cos, sin = (z if z.ndim == 4 else z.unsqueeze(-2) for z in (cos, sin))
    if cos.shape[-1] < C:
        cos, sin = (torch.stack((z, z), dim).flatten(-2) for z in (cos, sin))

    def rotate(x):
        x, rest = x[..., :C], x[..., C:]
        a, b = x.unflatten(-1, pairs).unbind(dim)
        return torch.cat((x * cos + torch.stack((-b, a), dim).flatten(-2) * sin, rest), -1)

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


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_forms_of_tables_match_matrices(pairing, form):
    assert_same_in_float64(rope_table, with_matrices, make_form(*form) | {"pairing": pairing})


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
    rule = r"\(5, W\), \(2, 5, W\) or \(2, 5, 1, W\) with W 12 or 6, where .* got"
    raises(ValueError, rf"cos must have shape {rule} \(5, 8\)", op, good, cos=randn(5, 8))
    raises(ValueError, rf"cos must have shape {rule} \(\)", op, good, cos=randn())
    raises(ValueError, rf"sin must have shape {rule} \(3, 5, 12\)", op, good, sin=randn(3, 5, 12))
    raises(ValueError, "as many entries as cos, 12, got 6", op, good, sin=randn(5, 6))
    heads = randn(2, 5, 4, 12)
    raises(ValueError, "as many of k as of q, got 2 and 4", op, good, cos=heads, sin=heads)
    raises(ValueError, r"\(2, 5, 4, W\)", op, good, k=None, cos=randn(2, 5, 3, 12))
    raises(ValueError, "with W 8 or 4", op, good, channels=8)
    for channels in (-2, 0, 7, 14):
        raises(ValueError, rf"even and within 2..12, got {channels}", op, good, channels=channels)
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


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_accuracy_of_forms(kernel, pairing, form, dtype):
    inputs = make_form(*form) | {"pairing": pairing}
    assert_accurate(kernel, eager, inputs, dtype, wrt="qk")


@pytest.mark.parametrize("kernel", ("torch", *BACKENDS), indirect=True)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_channels_that_are_not_rotated_keep_their_bits(kernel, pairing):
    """What is not finite too, forward and backward, and in the forward negative zeros. A NaN stays
    one; GPUs have a single one."""
    inputs = cast(make_form(14, 2, (3, 7)), torch.float16) | {"pairing": pairing}
    for x in (inputs["q"], inputs["k"]):
        x[..., 14:] = torch.tensor([-0.0, torch.inf, torch.nan, 6e-8, 65504, -torch.inf])
    found = run(kernel, inputs, "qk")
    for n, x in enumerate((inputs["q"], inputs["k"])):
        out, x = found[f"out {n}"][..., 14:], x[..., 14:]
        assert torch.equal(out.isnan(), x.isnan())
        out, x = (z.masked_fill(z.isnan(), 0).view(torch.int16) for z in (out, x))
        assert torch.equal(out, x)
        assert found[f"out {n}"][..., :14].isfinite().all()
    q, k = (x.detach().requires_grad_() for x in (inputs["q"], inputs["k"]))
    torch.autograd.backward(kernel(**inputs | {"q": q, "k": k}), (inputs["q"], inputs["k"]))
    for x in (q, k):
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(x.grad[..., 14:], x.detach()[..., 14:], **exact)


@pytest.mark.parametrize("kernel", ("torch", *BACKENDS), indirect=True)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("channels, shape", ((8, (2, 2, 8)), (8, (2, 4)), (6, (2, 2, 2, 3))))
def test_tables_of_any_strides(kernel, pairing, channels, shape):
    """Parts of complex numbers, of matrices, transposed, the same for all tokens, in float64."""
    table, x = (randn(*shape).float(), randn(*shape).float()), randn(2, 2, 2, 8).float()
    matrices = torch.stack((*table, *table), -1).unflatten(-1, (2, 2))
    for cos, sin in (
        (torch.complex(*table).real, torch.complex(*table).imag),
        (matrices[..., 0, 0], matrices[..., 0, 1]),
        (table[0].mT.contiguous().mT, table[1].mT.contiguous().mT),
        (table[0].double(), table[1].double()),
        (table[0].half(), table[1].bfloat16()),
        tuple(z.narrow(-2, 0, 1).expand(shape) for z in table),
        tuple(z[..., :1].expand(shape) for z in table),
        tuple(z.movedim(0, -1).contiguous().movedim(-1, 0) for z in table),
    ):
        plain = cos.float().contiguous(), sin.float().contiguous()
        expected, _ = kernel(x, None, *plain, pairing, channels)
        assert torch.equal(kernel(x, None, cos, sin, pairing, channels)[0], expected)


@pytest.mark.parametrize("kernel", ("torch", *BACKENDS), indirect=True)
@pytest.mark.parametrize("shared", ("cos", "sin"))
def test_one_table_for_each_head_and_one_for_all(kernel, shared):
    inputs = cast(make_form(16, 3, (2, 3, 3, 8)))
    row = inputs[shared][0, :, 0]
    whole = row[:, None].expand(2, 3, 3, 8).contiguous()
    found = run(kernel, inputs | {shared: row}, "qk")
    assert_equal_results(found, run(kernel, inputs | {shared: whole}, "qk"))


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
