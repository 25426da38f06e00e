import math
from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    IMPLEMENTATIONS,
    NATIVE,
    OP_LEVELS,
    assert_accurate,
    assert_equal_results,
    assert_same_in_float64,
    at_cpu_level,
    cast,
    raises,
    randn,
    run,
)

from lumina_kernels import rope3d


@pytest.fixture(params=BACKENDS)
def kernel(request):
    return partial(rope3d, backend=request.param)


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
    """Every pair as a complex number, as in the models' own code."""
    acc = torch.promote_types(q.dtype, torch.float32)
    freq = inv_freq.to(acc) if inv_freq.ndim == 1 else inv_freq.to(acc)[:, None]
    coordinate = torch.stack([positions[..., n] for n in axis.tolist()], -1)
    angle = (coordinate * freq)[..., None, :].to(acc)
    rotation = torch.polar(torch.ones_like(angle), angle)

    def rotate(x):
        pairs = torch.view_as_complex(x.to(acc).reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

    return rotate(q), rotate(k)


def fixed(fn, table):
    """fn of q and k, with the table filled in."""
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
    """Quarter turns: each pair rotates by its own axis and frequency."""
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


def test_errors():
    good, op = make_inputs() | make_table(5, 12), rope3d
    k, positions = good["k"], good["positions"]
    raises(ValueError, r"q must have shape \(B, L, H, K\)", op, good, q=randn(2, 5, 48))
    raises(ValueError, r"\(2, 5, 2, 12\), got \(2, 6, 2, 12\)", op, good, k=randn(2, 6, 2, 12))
    raises(ValueError, "k must have shape", op, good, k=randn(2, 5, 2, 10))
    raises(TypeError, "k must have the dtype of q", op, good, k=k.float())
    odd = {"q": randn(2, 5, 4, 11), "k": randn(2, 5, 2, 11)}
    raises(ValueError, "even head_dim to rotate pairs, got 11", op, good, **odd)
    raises(ValueError, r"\(5, 3\) or \(2, 5, 3\), got", op, good, positions=positions[:, :2])
    match = "positions must be integer or floating, got torch.bool"
    raises(TypeError, match, op, good, positions=positions > 0)
    raises(ValueError, r"\(6,\) or \(2, 6\), got \(12,\)", op, good, inv_freq=randn(12))
    raises(TypeError, "inv_freq must be float16", op, good, inv_freq=positions[0].repeat(2))
    raises(ValueError, r"axis must have shape \(6,\)", op, good, axis=good["axis"][:3])
    raises(TypeError, "axis must be int32 or int64, got torch.float64", op, good, axis=randn(6))


@pytest.mark.skipif(
    DEVICE != "cpu", reason="a device reports an index out of range by failing as a whole"
)
@pytest.mark.parametrize("column", (-1, 3))
def test_axis_out_of_range(column):
    axis = torch.full((6,), column)
    good = make_inputs() | make_table(5, 12)
    raises((IndexError, RuntimeError), "bounds|out of range", rope3d, good, axis=axis)


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@TABLES
def test_accuracy(kernel, table, dtype):
    assert_accurate(fixed(kernel, table), fixed(with_complex_numbers, table), make_inputs(), dtype)


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize(
    "shape",
    (
        (1, 1, 1, 1, 2),
        (1, 5, 3, 2, 10),
        (2, 33, 1, 1, 24),  # CUDA: several tokens in a block, the last one not full
        (1, 3, 12, 5, 88),  # Triton: heads and channels padded to powers of two
        (1, 2, 32, 8, 72),  # Lumina-Next's; CUDA: two heads in a thread
        (1, 1, 40, 40, 128),  # CUDA: more than two
        (1, 2, 2, 1, 2060),  # CUDA: a head in two blocks
    ),
)
def test_accuracy_of_shapes(kernel, shape, dtype):
    """The angles are float32 whatever the dtype of q."""
    table = make_table(shape[1], shape[-1], B=shape[0])
    fns = fixed(kernel, table), fixed(with_complex_numbers, table)
    assert_accurate(*fns, make_inputs(*shape), dtype)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("H, G", ((0, 3), (3, 0)))
def test_one_without_heads(backend, H, G):
    table = make_table(3, 16)
    fns = (fixed(partial(rope3d, backend=name), table) for name in (backend, "torch"))
    assert_accurate(*fns, make_inputs(2, 3, H, G, 16), torch.float16)


def test_views(kernel):
    """One projection, aligned to 16 bytes or not; heads first; channels first; expanded."""
    fn = fixed(kernel, make_table(5, 16))

    def assert_same(q, k):
        packed = {"q": q.contiguous(), "k": k.contiguous()}
        assert_equal_results(run(fn, {"q": q, "k": k}), run(fn, packed))

    for start, width in ((0, 104), (3, 104), (0, 107)):
        projection = randn(2, 5, width).half()[..., start : start + 96]
        q, k = (x.unflatten(-1, (-1, 16)) for x in projection.split((64, 32), -1))
        assert_same(q, k)
    assert_same(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)))
    assert_same(*(x.mT.contiguous().mT for x in (q, k)))
    assert_same(q[:1, :, :1].expand(2, 5, 4, 16), k[:1, :1].expand(2, 5, 2, 16))


@pytest.mark.parametrize("kernel", ("torch", *BACKENDS), indirect=True)
def test_tables_of_any_dtype_and_layout(kernel):
    inputs, table = cast(make_inputs()), make_table(5, 12)
    expected = kernel(**inputs, **table)[0]
    wide = torch.zeros(5, 7, dtype=torch.int16, device=DEVICE)
    wide[:, 1::2] = table["positions"]
    dtypes = "uint8 int8 int16 int32 float16 bfloat16 float32 float64".split()
    for same in (
        *({"positions": table["positions"].to(getattr(torch, name))} for name in dtypes),
        {"positions": wide[:, 1::2]},
        {"positions": table["positions"].expand(2, 5, 3)},
        {"inv_freq": table["inv_freq"].float().repeat_interleave(2)[::2]},
        {"inv_freq": table["inv_freq"].float().expand(2, 6)},
        {"axis": table["axis"].int().repeat_interleave(2)[::2]},
    ):
        assert torch.equal(kernel(**inputs, **table | same)[0], expected)
    for dtype in (torch.float16, torch.bfloat16):
        low = {"inv_freq": table["inv_freq"].to(dtype)}
        out, high = kernel(**inputs, **table | low), {"inv_freq": low["inv_freq"].float()}
        assert torch.equal(out[0], kernel(**inputs, **table | high)[0])
    half, slow = ({name: table[name] / 2} for name in ("positions", "inv_freq"))
    halves = (kernel(**inputs, **table | x)[0] for x in (half, slow))
    torch.testing.assert_close(*halves)
    far = table | {"positions": table["positions"] + 100_000}
    torch.testing.assert_close(kernel(**inputs, **far), rope3d(**inputs, **far, backend="torch"))


@pytest.mark.parametrize("column", (-1, 3))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_an_axis_out_of_range_gives_nan(kernel, column, dtype):
    inputs, table = make_inputs(), make_table(5, 12)
    table["axis"][2] = column
    table["axis"] = table["axis"].to(dtype)
    q, _ = kernel(**cast(inputs), **table)
    assert q[..., 4:6].isnan().all() and not q[..., 6:].isnan().any()


@pytest.mark.parametrize("level", OP_LEVELS)
def test_every_instruction_set_has_sine_and_cosine(level):
    """Beyond 1.5e6 too: the C++ kernels take the angles of such a token one by one."""
    far = (10 ** torch.linspace(6, 38, 64)).float()
    q, table = torch.tensor([1.0, 0.0]).repeat(1, 1, 1, 64), (torch.ones(1, 3), far)
    with at_cpu_level(level):
        test_sine_and_cosine(partial(rope3d, backend="cpu"))
        out, _ = rope3d(q, q, *table, torch.zeros(64).int(), backend="cpu")
    exact = torch.stack((far.double().cos(), far.double().sin()), -1).flatten()
    assert (out.flatten() - exact).abs().max() <= 1.1 * torch.finfo(torch.float32).eps


def test_sine_and_cosine(kernel):
    """Within 1.1 ulp of 1, near multiples of pi/2 too; bounded beyond 1.5e6; nan for no number."""
    quarters = torch.arange(-8192, 8192).double() * 115 * (math.pi / 2)
    spread = (torch.rand(3, 16384, dtype=torch.float64) * 2 - 1) * torch.tensor([[1], [1e3], [1e6]])
    angles = torch.cat((quarters.expand(2, -1), spread)).float().to(DEVICE)
    special = torch.tensor([0.0, 1e-30, 1e7, -3e9, 3e38, math.inf, -math.inf, math.nan])
    angles[0, :8] = special
    q = torch.tensor([1.0, 0.0], device=DEVICE).repeat(5, 1, 1, 16384)
    axis, positions = torch.zeros(16384, device=DEVICE).int(), torch.ones(1, 3, device=DEVICE)
    out, _ = kernel(q, q, positions, angles, axis)
    cos, sin = out.view(5, 16384, 2).unbind(-1)
    for values, exact in ((cos, angles.double().cos()), (sin, angles.double().sin())):
        error = (values - exact).abs()
        error[0, 2:8] = 0
        assert error.max() <= 1.1 * torch.finfo(torch.float32).eps
        assert values[0, 2:5].abs().max() <= 1 and values[0, 5:8].isnan().all()
    assert sin[0, 0] == 0 and cos[0, 0] == 1 and sin[0, 1] == angles[0, 1]
