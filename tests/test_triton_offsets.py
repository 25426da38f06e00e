"""Offsets beyond 2^31 in Triton's kernels. Such tensors are of memory that is never touched but for
a few rows, so it is never there; and of a large grid only the last program runs."""

import builtins

import pytest
import torch
from common import DEVICE

from lumina_kernels import (
    context_drop,
    gqa_attention,
    qk_norm_rope3d,
    rope3d,
    rope_table,
    sandwich_norm,
    sandwich_norm_chain,
    swiglu,
)
from lumina_kernels.triton._arguments import heads_of

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of Triton's interpreter")
K = 8


@pytest.fixture(autouse=True)
def untouched_memory(monkeypatch):
    """The interpreter does not write back what it has not copied, and torch.empty stays empty."""
    from triton.runtime import interpreter

    def few(*args):
        return builtins.range(*args) if args[0] < 2**20 else [args[0] - 1]

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(interpreter, "range", few, raising=False)


def apart(shape, strides, dtype=torch.float16):
    """Random numbers of that shape and those strides in memory that is otherwise untouched."""
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    view = torch.empty(last + 1, dtype=dtype).as_strided(shape, strides)
    drawn = torch.randn(shape) if dtype.is_floating_point else torch.randint(100, shape)
    return view.copy_(drawn)


def heads(H=3):
    """(1, 2, H, K), whose last head is 2^31 after the first."""
    return apart((1, 2, H, K), (0, K, 2**31 // (H - 1), 1))


def assert_equal(found, expected):
    found, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


ROTATION = {
    "positions": torch.arange(6).view(2, 3),
    "inv_freq": torch.rand(K // 2),
    "axis": torch.arange(K // 2) % 3,
}
TABLES = torch.rand(2, K), torch.rand(2, K)
CALLS = {
    "rope3d": lambda x: rope3d(x, x, **ROTATION, backend="triton"),
    "rope_table": lambda x: rope_table(x, x, *TABLES, "half", backend="triton"),
    "qk_norm_rope3d": lambda x: qk_norm_rope3d(
        x, x, *[None] * 4, **ROTATION, norm="rms_per_head", backend="triton"
    ),
    "context_drop": lambda x: context_drop(x, x, (1, 1, 2), 2, backend="triton"),
    "gqa_attention": lambda x: gqa_attention(x, x, x, backend="triton"),
}


@pytest.mark.parametrize("op", CALLS)
def test_heads_far_apart(op):
    x = heads()
    assert x.stride(2) * 2 == 2**31
    assert_equal(CALLS[op](x), CALLS[op](x.contiguous()))


@pytest.mark.parametrize(
    "stride_l, stride_h, copied",
    ((2**22, 2**29, True), (2**22 - 1, 2**29, False), (K, 2**30, True), (K, 2**30 - 1025, False)),
)
def test_tokens_and_heads_of_a_tile_reach_no_further_than_32_bits(stride_l, stride_h, copied):
    x = torch.empty_strided((1, 9, 2, K), (0, stride_l, stride_h, 1), device="meta")
    y, *strides = heads_of(x)
    assert (y is not x) == copied
    assert strides == ([0, 2 * K, K] if copied else [0, stride_l, stride_h])


def test_positions_with_columns_far_apart():
    far = {**ROTATION, "positions": apart((2, 3), (1, 2**30), torch.uint8)}
    near = {**ROTATION, "positions": far["positions"].contiguous()}
    x = torch.randn(1, 2, 3, K)
    assert_equal(rope3d(x, x, **far, backend="triton"), rope3d(x, x, **near, backend="triton"))


def test_tables_of_heads_and_with_entries_far_apart():
    x = torch.randn(1, 2, 3, K)
    for shape, strides in (((1, 2, 3, K), (0, K, 2**30, 1)), ((2, K // 2), (1, 2**30))):
        far = apart(shape, strides)
        near = far.contiguous()
        found = rope_table(x, x, far, far, backend="triton")
        assert_equal(found, rope_table(x, x, near, near, backend="triton"))


@pytest.mark.parametrize("strides", ((0, 2**31, 1), (0, 1, 2**30)))
def test_text_masks_of_tokens_far_apart(strides):
    far = apart((1, 2, 3), strides, torch.uint8).view(torch.bool)
    far.copy_(torch.tensor([[1, 0, 1], [0, 1, 1]]))
    x, text, gate = torch.randn(1, 2, 1, K), torch.randn(1, 3, 1, K), torch.ones(1)
    results = []
    for mask in (far, far.contiguous()):
        leaves = [z.detach().requires_grad_() for z in (x, text)]
        q, y = leaves
        out = gqa_attention(
            q, x, x, text_k=y, text_v=y, text_mask=mask, text_gate=gate, backend="triton"
        )
        results.append((out, *torch.autograd.grad(out, leaves, out.detach().sin())))
    assert_equal(*results)


@pytest.mark.parametrize("op", (sandwich_norm, sandwich_norm_chain))
def test_gates_and_scales_of_samples_far_apart(op):
    shapes = ((3, 2, K), (3, 2, K), (K,), (3, K), (K,), (3, K))
    count = 4 if op is sandwich_norm else 6
    near = [torch.randn(shape).half() for shape in shapes[:count]]
    far = [apart((3, K), (2**30, 1)) if x.shape == (3, K) else x for x in near]
    near = [x.contiguous() for x in far]
    results = []
    for inputs in (far, near):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = op(*leaves, backend="triton")
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])
        results.append((*outs, *grads))
    assert_equal(*results)


def test_a_row_of_almost_2_to_the_31_values():
    count = 2**31 - 1
    a, b = (torch.empty(count, dtype=torch.float16) for _ in range(2))
    a[-1023:], b[-1023:] = torch.randn(1023), torch.randn(1023)
    out = swiglu(a, b, backend="triton")[-1023:]
    assert_equal(out, swiglu(a[-1023:], b[-1023:], backend="triton"))


def test_a_window_of_almost_2_to_the_31_tokens_a_side():
    k, v = torch.randn(2, 1, 6, 2, K)
    found = context_drop(k, v, (1, 2, 3), 2**31 - 1, backend="triton")
    assert_equal(found, context_drop(k, v, (1, 2, 3), 3, backend="triton"))
