import math

import pytest
import torch
from common import (
    DEVICE,
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

from lumina_kernels import rope3d


def make_table(L, K, B=None, per_sample_freq=False):
    """Positions (L, 3) or (B, L, 3), frequencies, and Lumina-Next's alternating h, w axes."""
    shape = (L, 3) if B is None else (B, L, 3)
    inv_freq = 100.0 ** -torch.linspace(0, 1, K // 2, dtype=torch.float64)
    if per_sample_freq:
        inv_freq = inv_freq / torch.arange(1, B + 1).unsqueeze(-1)
    axis = torch.arange(K // 2) % 2 + 1
    table = {"positions": torch.randint(0, 64, shape), "inv_freq": inv_freq, "axis": axis}
    return {name: tensor.to(DEVICE) for name, tensor in table.items()}


def make_inputs(B=2, L=5, H=4, G=2, K=12):
    return {"q": randn(B, L, H, K), "k": randn(B, L, G, K)}


def with_complex_numbers(q, k, positions, inv_freq, axis):
    """The same with every pair as a complex number, as the models' own code has it."""
    acc = torch.promote_types(q.dtype, torch.float32)
    freq = inv_freq.to(acc) if inv_freq.ndim == 1 else inv_freq.to(acc)[:, None]
    coordinate = torch.stack([positions[..., n] for n in axis.tolist()], -1)
    angle = (coordinate * freq)[..., None, :].to(acc)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(x):
        pairs = torch.view_as_complex(x.to(acc).reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    return rotate(q), rotate(k)


def fixed(fn, table):
    """fn of q and k, the table held."""
    return lambda **inputs: fn(**inputs, **table)


TABLES = pytest.mark.parametrize(
    "table",
    (
        make_table(5, 12),
        make_table(5, 12, B=2),
        make_table(5, 12, B=2, per_sample_freq=True),
        make_table(5, 12, B=2, per_sample_freq=True)
        | {"positions": make_table(5, 12)["positions"]},
    ),
    ids=("shared", "positions per sample", "all per sample", "frequencies per sample"),
)


@TABLES
def test_gradcheck(table):
    leaves = [tensor.requires_grad_() for tensor in make_inputs(H=2, G=1).values()]
    assert torch.autograd.gradcheck(lambda q, k: rope3d(q, k, **table), leaves)


@TABLES
def test_matches_complex_numbers(table):
    assert_same_in_float64(fixed(rope3d, table), fixed(with_complex_numbers, table), make_inputs())


def test_known_rotations():
    """Quarter turns: each pair turns by its own axis and frequency."""
    q = torch.tensor([1.0, 2.0] * 3, device=DEVICE).view(1, 1, 1, 6)
    positions = torch.tensor([[1, 2, 3]], device=DEVICE)
    inv_freq = torch.full((3,), math.pi / 2, device=DEVICE)
    out, _ = rope3d(q, q, positions, inv_freq, torch.tensor([2, 0, 1], device=DEVICE))
    expected = torch.tensor([2.0, -1.0, -2.0, 1.0, -1.0, -2.0], device=DEVICE)  # 270, 90, 180
    torch.testing.assert_close(out.flatten(), expected)


def test_scores_depend_on_differences_only():
    table, inputs = make_table(5, 12), make_inputs(G=4)
    moved = table | {"positions": table["positions"] + torch.tensor([7, -3, 11], device=DEVICE)}
    q, k = rope3d(**inputs, **table)
    q_moved, k_moved = rope3d(**inputs, **moved)
    scores, scores_moved = (
        (a.unsqueeze(2) * b.unsqueeze(1)).sum(-1) for a, b in ((q, k), (q_moved, k_moved))
    )
    torch.testing.assert_close(scores, scores_moved)


def test_positions_may_be_fractions_and_integers_of_any_width():
    table, inputs = make_table(5, 12), make_inputs()
    for dtype in (torch.int32, torch.int16, torch.float32, torch.float64):
        same = table | {"positions": table["positions"].to(dtype)}
        assert torch.equal(rope3d(**inputs, **same)[0], rope3d(**inputs, **table)[0])
    half = table | {"positions": table["positions"] / 2}
    slow = table | {"inv_freq": table["inv_freq"] / 2}
    torch.testing.assert_close(rope3d(**inputs, **half)[0], rope3d(**inputs, **slow)[0])
    axis = table | {"axis": table["axis"].int()}
    assert torch.equal(rope3d(**inputs, **axis)[0], rope3d(**inputs, **table)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    """head_dim 72, Lumina-Next's; the angles are float32 whatever the dtype of q."""
    table = make_table(7, 72)
    inputs = make_inputs(2, 7, 4, 2, 72)
    assert_accurate(fixed(rope3d, table), fixed(with_complex_numbers, table), inputs, dtype)


def test_bfloat16_is_rounded_once():
    table = make_table(7, 72)
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(2, 7, 4, 2, 72).items()}
    exact = rope3d(**{name: tensor.double() for name, tensor in inputs.items()}, **table)
    for out, value in zip(rope3d(**inputs, **table), exact, strict=True):
        assert_rounded_once(out, value)


def test_strided():
    table = make_table(5, 12)
    assert_strided_is_same(fixed(rope3d, table), make_inputs())
    q, k = randn(2, 5, 72).split((48, 24), -1)  # one fused projection
    q, k = q.unflatten(-1, (4, 12)), k.unflatten(-1, (2, 12))
    for out, expected in zip(
        rope3d(q, k, **table), rope3d(q.contiguous(), k.contiguous(), **table), strict=True
    ):
        assert torch.equal(out, expected)


def test_empty_batch():
    results = run(fixed(rope3d, make_table(5, 12, B=0)), make_inputs(B=0))
    assert results["out 0"].shape == (0, 5, 4, 12) and results["dk"].shape == (0, 5, 2, 12)


@pytest.mark.parametrize("per_sample", (False, True))
def test_compile(per_sample):
    sizes = ((5, 7, 4, 2, 16), (7, 9, 4, 2, 16), (9, 13, 8, 4, 20))
    examples = []
    for B, L, H, G, K in sizes:
        table = make_table(L, K, B, True) if per_sample else make_table(L, K)
        examples.append(make_inputs(B, L, H, G, K) | table)
    assert_compiles(rope3d, *examples)


def test_errors():
    good = make_inputs() | make_table(5, 12)
    raises(ValueError, r"q must have shape \(B, L, H, K\)", rope3d, good, q=randn(2, 5, 48))
    raises(
        ValueError,
        r"k must have shape \(2, 5, 2, 12\), got \(2, 6, 2, 12\)",
        rope3d,
        good,
        k=randn(2, 6, 2, 12),
    )
    raises(ValueError, "k must have shape", rope3d, good, k=randn(2, 5, 2, 10))
    raises(TypeError, "k must have the dtype of q", rope3d, good, k=good["k"].float())
    odd = {"q": randn(2, 5, 4, 11), "k": randn(2, 5, 2, 11)}
    raises(ValueError, "even head_dim to rotate pairs, got 11", rope3d, good, **odd)
    raises(
        ValueError,
        r"positions must have shape \(5, 3\) or \(2, 5, 3\)",
        rope3d,
        good,
        positions=good["positions"][:, :2],
    )
    raises(
        TypeError,
        "positions must be integer or floating, got torch.bool",
        rope3d,
        good,
        positions=good["positions"] > 0,
    )
    raises(
        ValueError,
        r"inv_freq must have shape \(6,\) or \(2, 6\), got \(12,\)",
        rope3d,
        good,
        inv_freq=randn(12),
    )
    raises(
        TypeError,
        "inv_freq must be float16",
        rope3d,
        good,
        inv_freq=torch.ones(6, device=DEVICE).long(),
    )
    raises(ValueError, r"axis must have shape \(6,\)", rope3d, good, axis=good["axis"][:3])
    raises(TypeError, "axis must be int32 or int64, got torch.float64", rope3d, good, axis=randn(6))
    raises(ValueError, "'cuda' is not there yet", rope3d, good, backend="cuda")


@pytest.mark.skipif(
    DEVICE != "cpu", reason="a device reports an index out of range by failing as a whole"
)
@pytest.mark.parametrize("column", (-1, 3))
def test_axis_out_of_range(column):
    axis = torch.full((6,), column)
    good = make_inputs() | make_table(5, 12)
    raises((IndexError, RuntimeError), "bounds|out of range", rope3d, good, axis=axis)
