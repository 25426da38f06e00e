"""gqa_attention's log-sum-exp, and attentions to parts of the keys that are merged by it."""

from functools import partial, reduce

import pytest
import torch
from attention import eager, make_inputs
from common import (
    BACKENDS,
    IMPLEMENTATIONS,
    NATIVE,
    assert_accurate,
    assert_compiles,
    assert_same_in_float64,
    cast,
    raises,
    randn,
    run,
)
from torch.nn import functional as F

from lumina_kernels import gqa_attention, merge_attention
from lumina_kernels.ops.gqa_attention import LSE_FLOOR

IN_PARTS = {
    # Holes, a part in the middle without a valid key, a sample without any.
    "masked": ({"H": 8, "G": 2}, None, (30, 45, 60)),
    "many heads": ({"B": 2, "L": 3, "H": 28, "G": 7}, None, (41,)),
    "bias of keys": ({"H": 4, "G": 2}, (3, 1, 1, 75), (15, 50)),
    "bias of pairs": ({"H": 4, "G": 2}, (4, 5, 75), (40,)),
}


def inputs_of(name):
    sizes, bias, cuts = IN_PARTS[name]
    inputs = make_inputs(L_kv=75, K=24, text=False, **sizes)
    if bias is not None:
        inputs["bias"] = randn(*bias)
    elif len(cuts) == 3:
        inputs["key_mask"][:, cuts[0] : cuts[1]] = False
    return inputs, cuts


def in_parts(q, k, v, key_mask, scale, bias=None, *, cuts, backend):
    """One attention for each part of the keys, merged in order, rounded once."""
    parts = []
    for first, end in zip((0, *cuts), (*cuts, k.shape[1]), strict=True):
        own = None if bias is None else bias[..., first:end]
        keys = k[:, first:end], v[:, first:end], key_mask[:, first:end]
        call = partial(gqa_attention, return_lse=True, backend=backend)
        parts.append(call(q, *keys, scale, bias=own))
    out, lse = reduce(lambda a, b: merge_attention(*a, *b), parts)
    return out.to(q.dtype), lse


eager_with_lse = partial(eager, return_lse=True)


@pytest.mark.parametrize("name", IN_PARTS)
@pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS)
def test_parts_make_the_whole(backend, dtype, name):
    inputs, cuts = inputs_of(name)
    fn = partial(in_parts, cuts=cuts, backend=backend)
    assert_accurate(fn, eager_with_lse, inputs, dtype)


@pytest.mark.parametrize("name", IN_PARTS)
def test_parts_make_the_whole_in_float64(name):
    inputs, cuts = inputs_of(name)
    whole = partial(in_parts, cuts=(), backend="torch")
    assert_same_in_float64(whole, eager_with_lse, inputs)
    assert_same_in_float64(partial(in_parts, cuts=cuts, backend="torch"), whole, inputs)


@pytest.mark.parametrize("backend", ("torch", *BACKENDS))
def test_a_query_of_nan_has_a_log_sum_exp_of_nan(backend):
    """The floor would hide it: a merge gives such a part no weight."""
    inputs = cast(make_inputs(L=3, L_kv=7, text=False))
    inputs["q"][0, 1] = torch.nan
    for x in gqa_attention(**inputs, return_lse=True, backend=backend):
        row = x[0].isnan().flatten(1).all(1)
        assert row.tolist() == [False, True, False] and x.isnan().sum() == x[0, 1].numel()


@pytest.mark.parametrize("backend", ("torch", *BACKENDS))
@pytest.mark.parametrize("L_kv", (0, 7))
def test_rows_without_a_key_have_the_floor(backend, L_kv):
    inputs = cast(make_inputs(L_kv=L_kv, text=False))
    inputs["key_mask"] = torch.zeros_like(inputs["key_mask"])
    found = run(partial(gqa_attention, return_lse=True, backend=backend), inputs)
    assert found.pop("out 1").eq(LSE_FLOOR).all()
    assert all(value.eq(0).all() for value in found.values())


def test_two_parts_without_a_key_are_one():
    nothing = {"out_a": torch.zeros(2, 3, 4, 8), "lse_a": torch.full((2, 3, 4), LSE_FLOOR)}
    nothing |= {"out_b": nothing["out_a"], "lse_b": nothing["lse_a"]}
    merged = run(merge_attention, nothing)
    assert merged["out 0"].eq(0).all() and merged["out 1"].eq(LSE_FLOOR).all()
    assert all(value.isfinite().all() for value in merged.values())


def usual_merge(out_a, lse_a, out_b, lse_b):
    """That of ring-flash-attention, torch.distributed and diffusers."""
    lse_a, lse_b = lse_a.unsqueeze(-1), lse_b.unsqueeze(-1)
    out = out_a - F.sigmoid(lse_b - lse_a) * (out_a - out_b)
    return out, (lse_a - F.logsigmoid(lse_a - lse_b)).squeeze(-1)


@pytest.mark.parametrize("empty", (0, 1, 2))
def test_the_usual_merge_takes_a_part_without_a_key(empty):
    """The first one costs it as much as a rounding to 16 bits; -inf would make NaN of it."""
    inputs = cast(make_inputs(L_kv=60, text=False)) | {"key_mask": None}
    parts = []
    for i in range(3):
        mask = torch.full((3, 20), i != empty)
        keys = [inputs[n][:, 20 * i : 20 * i + 20] for n in "kv"]
        parts.append(gqa_attention(inputs["q"], *keys, mask, 0.3, return_lse=True))
    found, lse = reduce(lambda a, b: usual_merge(*a, *b), parts)
    out, exact = reduce(lambda a, b: merge_attention(*a, *b), parts)
    assert (found - out).abs().max() <= 1e-4 and (lse - exact).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_strides(backend):
    """Of a sum they are one number, expanded; and one of both outputs alone may have one."""
    inputs = cast(make_inputs(text=False))
    fn = partial(gqa_attention, return_lse=True, backend=backend)

    def grads(loss):
        leaves = {n: inputs[n].clone().requires_grad_() for n in "qkv"}
        loss(*fn(**inputs | leaves)).backward()
        return [x.grad for x in leaves.values()]

    ways = (lambda out, lse: lse.sum()), (lambda out, lse: (lse * torch.ones_like(lse)).sum())
    for found, expected in zip(*map(grads, ways), strict=True):
        assert torch.equal(found, expected)
    back = lambda out, lse: (lse.transpose(1, 2).exp() * torch.arange(5.0)).sum()  # noqa: E731
    plain = lambda out, lse: (lse.exp() * torch.arange(5.0)[:, None]).sum()  # noqa: E731
    for found, expected in zip(grads(back), grads(plain), strict=True):
        assert torch.equal(found, expected)


def test_a_merge_compiles():
    def example(B, L):
        found = make_inputs(B=B, L=L, L_kv=20, text=False)
        return cast({n: x for n, x in found.items() if n != "scale"})

    def fn(**inputs):
        return in_parts(**inputs, scale=0.3, cuts=(8,), backend=NATIVE[0])

    assert_compiles(fn, example(3, 5), example(4, 6))


def test_text_is_added_after_the_merge():
    """Its term is that of a call without keys."""
    inputs = make_inputs(L_kv=20)

    def fn(q, k, v, key_mask, scale, **text):
        out, _ = in_parts(q, k, v, key_mask, scale, cuts=(8,), backend="torch")
        return out + gqa_attention(q, k[:, :0], v[:, :0], **text)

    assert_same_in_float64(fn, gqa_attention, inputs)


def test_errors():
    inputs = make_inputs()
    raises(ValueError, "return_lse takes no text", gqa_attention, inputs, return_lse=True)
