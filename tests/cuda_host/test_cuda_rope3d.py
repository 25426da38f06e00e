import math
from functools import partial

import pytest
import test_rope3d
import torch
from common import (
    DTYPES,
    assert_accurate,
    assert_strided_is_same,
    raises,
    randn,
)
from cuda_host.backend import cuda_on_host, on_host
from test_rope3d import fixed, make_inputs, make_table, with_complex_numbers

from lumina_kernels import rope3d

globals().update(on_host(test_rope3d))


@pytest.fixture(params=["cuda"])
def kernel(request):
    return partial(rope3d, backend=request.param)


@pytest.fixture(autouse=True)
def host():
    with cuda_on_host():
        yield


def low(inputs, dtype=torch.float32):
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    (
        (1, 1, 1, 1, 2),
        (1, 5, 3, 2, 10),
        (2, 33, 1, 1, 24),  # several tokens in a block, and not all of them there in the last
        (2, 3, 32, 8, 48),
        (1, 2, 32, 8, 72),  # Lumina-Next's, two heads in a thread
        (1, 2, 24, 8, 96),
        (1, 1, 40, 40, 128),  # more heads than two in a thread
        (1, 2, 3, 1, 300),
        (1, 2, 2, 1, 2060),  # a head in two blocks
    ),
)
def test_accuracy_of_shapes(kernel, shape, dtype):
    table = make_table(shape[1], shape[-1], B=shape[0])
    fns = fixed(kernel, table), fixed(with_complex_numbers, table)
    assert_accurate(*fns, make_inputs(*shape), dtype)


@pytest.mark.parametrize("H, G", ((0, 3), (3, 0)))
def test_one_without_heads(kernel, H, G):
    table = make_table(3, 16)
    fns = (fixed(partial(rope3d, backend=name), table) for name in ("cuda", "torch"))
    assert_accurate(*fns, make_inputs(2, 3, H, G, 16), torch.float16)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_takes_views(kernel, dtype):
    table = make_table(5, 16)
    inputs = low(make_inputs(K=16), dtype)
    assert_strided_is_same(fixed(kernel, table), inputs)
    for start, width in ((0, 104), (8, 104), (3, 104), (0, 107)):
        # One projection of q and k and more, aligned to 16 bytes and not.
        fused = randn(2, 5, width).to(dtype)[..., start : start + 96]
        q, k = (x.unflatten(-1, (-1, 16)) for x in fused.split((64, 32), -1))
        whole = kernel(q.contiguous(), k.contiguous(), **table)
        swapped = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        for views in ((q, k), swapped, (x.mT.contiguous().mT for x in (q, k))):
            for out, expected in zip(kernel(*views, **table), whole, strict=True):
                assert torch.equal(out, expected)
    q, k = q[:1, :, :1].expand(2, 5, 4, 16), k[:1, :1].expand(2, 5, 2, 16)
    whole = kernel(q.contiguous(), k.contiguous(), **table)
    for out, expected in zip(kernel(q, k, **table), whole, strict=True):
        assert torch.equal(out, expected)


def test_takes_any_table(kernel):
    """Positions and frequencies of any dtype, with gaps, from far away."""
    inputs, table = low(make_inputs()), make_table(5, 12)
    expected = kernel(**inputs, **table)[0]
    wide = torch.zeros(5, 7, dtype=torch.int16)
    wide[:, 1::2] = table["positions"]
    freq = torch.stack((table["inv_freq"], table["inv_freq"]), 1)[:, 0]
    dtypes = "uint8 int8 int16 int32 float16 bfloat16 float32 float64".split()
    for same in (
        *({"positions": table["positions"].to(getattr(torch, dtype))} for dtype in dtypes),
        {"positions": wide[:, 1::2]},
        {"positions": table["positions"].expand(2, 5, 3)},
        {"inv_freq": freq, "axis": table["axis"].int().repeat_interleave(2)[::2]},
        {"inv_freq": freq.float().expand(2, 6)},
    ):
        assert torch.equal(kernel(**inputs, **table | same)[0], expected)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = table | {"inv_freq": table["inv_freq"].to(dtype)}
        same = table | {"inv_freq": rounded["inv_freq"].float()}
        assert torch.equal(kernel(**inputs, **rounded)[0], kernel(**inputs, **same)[0])
    far = table | {"positions": table["positions"] + 100_000}
    torch.testing.assert_close(kernel(**inputs, **far), rope3d(**inputs, **far, backend="torch"))
    odd = table | {"positions": table["positions"].to(torch.uint16)}
    raises(RuntimeError, "positions must be float16", kernel, inputs | odd)


def test_refuses(kernel):
    inputs = low(make_inputs()) | make_table(5, 12)
    raises(TypeError, "takes no float64", kernel, inputs | make_inputs())
    learned = inputs["inv_freq"].float().requires_grad_()
    raises(NotImplementedError, "no gradient of inv_freq", kernel, inputs, inv_freq=learned)


@pytest.mark.parametrize("column", (-1, 3))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_marks_an_axis_out_of_range(kernel, column, dtype):
    inputs, table = make_inputs(), make_table(5, 12)
    table["axis"][2] = column
    table["axis"] = table["axis"].to(dtype)
    q, _ = kernel(**low(inputs), **table)
    assert q[..., 4:6].isnan().all() and not q[..., 6:].isnan().any()


def test_far_angles(kernel):
    """No number gives NaN; large angles turn without stretching."""
    angles = torch.tensor([0.0, 1e-30, 1e7, -3e9, 3e38, math.inf, -math.inf, math.nan])
    q = torch.tensor([1.0, 0.0]).repeat(1, 1, 1, 8)
    axis, positions = torch.zeros(8).int(), torch.ones(1, 3)
    out, _ = kernel(q, q, positions, angles, axis)
    cos, sin = out.view(8, 2).unbind(-1)
    exact = angles.double()
    assert (cos[:5] - exact[:5].cos()).abs().max() < 2e-7
    assert (sin[:5] - exact[:5].sin()).abs().max() < 2e-7
    assert out.view(8, 2)[5:].isnan().all() and sin[1] == angles[1]
