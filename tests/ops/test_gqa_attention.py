import math
import re

import pytest
import torch
from attention import make_inputs, make_mask
from common import (
    DEVICE,
    assert_equal_results,
    assert_same_in_float64,
    is_float,
    raises,
    randn,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lumina_kernels import gqa_attention


def with_loops(
    q, k, v, key_mask=None, scale=None, text_k=None, text_v=None, text_mask=None, text_gate=None,
    bias=None,
):  # fmt: skip
    """One query at a time, over the list of its valid keys."""
    B, L, H, K = q.shape

    def attend(k, v, mask, scale, bias, b, i, h):
        g = h // (H // k.shape[2])
        seen = mask[:, i] if mask is not None and mask.ndim == 3 else mask
        keys = [m for m in range(k.shape[1]) if seen is None or seen[b, m]]
        keys = [m for m in keys if bias is None or bias[b, h, i, m] != -math.inf]
        if not keys:
            return 0 * q[b, i, h]
        scores = [scale * (q[b, i, h] * k[b, m, g]).sum() for m in keys]
        if bias is not None:
            scores = [score + bias[b, h, i, m] for score, m in zip(scores, keys, strict=True)]
        exps = [torch.exp(score - max(scores).detach()) for score in scores]
        return sum(e * v[b, m, g] for e, m in zip(exps, keys, strict=True)) / sum(exps)

    plain = 1 / math.sqrt(K)
    bias = None if bias is None else bias.expand(B, H, L, k.shape[1])
    rows = []
    for b in range(B):
        for i in range(L):
            for h in range(H):
                row = attend(k, v, key_mask, plain if scale is None else scale, bias, b, i, h)
                if text_k is not None:
                    text = attend(text_k, text_v, text_mask, plain, None, b, i, h)
                    row = row + torch.tanh(text_gate[h]) * text
                rows.append(row)
    return torch.stack(rows).view(B, L, H, K)


def with_sdpa(
    q, k, v, key_mask=None, scale=None, text_k=None, text_v=None, text_mask=None, text_gate=None,
    bias=None,
):  # fmt: skip
    """PyTorch's attention with transposes, as models call it."""

    def attend(k, v, mask, scale, bias=None):
        mask = None if mask is None else mask[:, None, None]
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    out = attend(k, v, key_mask, scale, bias)
    if text_k is None:
        return out
    return out + torch.tanh(text_gate)[:, None] * attend(text_k, text_v, text_mask, None)


@pytest.mark.parametrize("own", (False, True))
def test_gradcheck_with_holes_and_rows_without_a_key(own):
    inputs = make_inputs(B=2, L=2, L_kv=3, T=2, H=2, G=1, K=3) | {"bias": randn(2, 2, 2, 3)}
    if own:  # every query has text of its own, the last one none
        inputs["text_mask"] = torch.tensor([[[1, 1], [0, 1]], [[1, 0], [0, 0]]], device=DEVICE) > 0
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if is_float(x)}

    def op(*tensors):
        return gqa_attention(**inputs | dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("G", (1, 2, 8))
def test_matches_loops(G):
    inputs = make_inputs(B=2, L=2, L_kv=4, T=3, H=8, G=G, K=6)
    inputs["bias"] = randn(2, 8, 2, 4)
    assert_same_in_float64(gqa_attention, with_loops, inputs)


def test_matches_loops_where_every_query_has_text_of_its_own():
    inputs = make_inputs(B=3, L=4, T=5, H=4, G=2, K=6)
    inputs["text_mask"] = make_mask(3, 20).view(3, 4, 5)
    inputs["text_mask"][0, 1] = False
    assert_same_in_float64(gqa_attention, with_loops, inputs)


@pytest.mark.parametrize("scale", (None, 0.2))
@pytest.mark.parametrize("text", (False, True))
def test_matches_sdpa_at_head_dim_72(text, scale):
    inputs = make_inputs(B=2, K=72, text=text) | {"key_mask": None, "scale": scale}
    if text:
        inputs["text_mask"] = None
    assert_same_in_float64(gqa_attention, with_sdpa, inputs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_mask(data):
    B, L, L_kv, T, G = (data.draw(st.integers(low, 3)) for low in (1, 1, 0, 0, 1))
    inputs = make_inputs(B, L, L_kv, T, 2 * G, G, 4)
    for name, length in (("key_mask", L_kv), ("text_mask", T)):
        bits = data.draw(st.lists(st.booleans(), min_size=B * length, max_size=B * length))
        inputs[name] = torch.tensor(bits, dtype=torch.bool, device=DEVICE).view(B, length)
    assert_same_in_float64(gqa_attention, with_loops, inputs)


@pytest.mark.parametrize("shape", ((1,), (7,), (5, 7), (8, 1, 7), (3, 1, 1, 7), (1, 8, 5, 7)))
def test_bias_broadcasts(shape):
    inputs = make_inputs(text=False, K=6) | {"bias": randn(*shape)}
    full = inputs | {"bias": inputs["bias"].expand(3, 8, 5, 7)}
    out, expected = run(gqa_attention, inputs), run(gqa_attention, full)
    assert out.pop("dbias").shape == shape and expected.pop("dbias").shape == (3, 8, 5, 7)
    assert_equal_results(out, expected)


def test_a_bias_of_minus_infinity_is_a_mask():
    inputs = make_inputs()
    off = torch.zeros(3, 1, 1, 7, dtype=torch.float64, device=DEVICE)
    off.masked_fill_(~inputs["key_mask"][:, None, None], -torch.inf)
    results = run(gqa_attention, inputs | {"key_mask": None, "bias": off})
    del results["dbias"]
    assert_equal_results(results, run(gqa_attention, inputs))


def test_a_closed_gate_is_no_text():
    inputs = make_inputs()
    alone = {name: inputs[name] for name in ("q", "k", "v", "key_mask", "scale")}
    closed = inputs | {"text_gate": torch.zeros_like(inputs["text_gate"])}
    assert torch.equal(gqa_attention(**closed), gqa_attention(**alone))


def test_errors():
    good, op = make_inputs(), gqa_attention
    mask, v, text_k = make_mask(3, 7), good["v"], good["text_k"]
    raises(ValueError, r"q must have shape \(B, L, H, K\)", op, good, q=randn(3, 5, 24))
    raises(ValueError, r"k must have shape \(B, L_kv, G, K\)", op, good, k=randn(3, 7, 24))
    raises(ValueError, r"k .* \(3, 7, 2, 24\), got \(3, 7, 2, 20\)", op, good, k=randn(3, 7, 2, 20))
    raises(ValueError, "divides the 8 of q, got 3", op, good, k=randn(3, 7, 3, 24))
    raises(ValueError, "v must have shape", op, good, v=randn(3, 6, 2, 24))
    raises(TypeError, "v must have the dtype of q, torch.float64, got", op, good, v=v.half())
    raises(TypeError, r"key_mask must be bool \(True: the key", op, good, key_mask=mask.int())
    raises(ValueError, r"key_mask must have shape \(3, 7\)", op, good, key_mask=make_mask(3, 8))
    match = r"bias must broadcast to \(3, 8, 5, 7\), got \(3, 7\)"
    raises(ValueError, match, op, good, bias=randn(3, 7))
    raises(ValueError, "bias must broadcast", op, good, bias=randn(1, 1, 1, 1, 1))
    raises(TypeError, "bias must be a tensor, got float", op, good, bias=0.0)
    raises(TypeError, "bias must be float16.*bool", op, good, bias=mask[:, None, None])
    raises(ValueError, "come together, text_v is None", op, good, text_v=None)
    raises(ValueError, "come together, text_gate is None", op, good, text_gate=None)
    alone = {"text_k": None, "text_v": None, "text_gate": None}
    raises(ValueError, "come together, text_k is None", op, good, **alone)
    raises(ValueError, r"text_k must have .* \(3, 4, 2, 24\)", op, good, text_k=randn(3, 4, 8, 24))
    raises(ValueError, "text_v must have shape", op, good, text_v=randn(3, 5, 2, 24))
    raises(TypeError, "text_k must have the dtype of q", op, good, text_k=text_k.float())
    raises(ValueError, r"text_gate .* shape \(8,\), got \(2,\)", op, good, text_gate=randn(2))
    raises(ValueError, r"text_mask must have shape \(3, 4\)", op, good, text_mask=make_mask(3, 5))
    for shape in ((3, 1, 4), (3, 4, 5), (3, 5, 1, 4), (1, 5, 4), (4,)):
        match = rf"text_mask must have shape \(3, 4\) or \(3, 5, 4\), got {re.escape(str(shape))}"
        text_mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
        raises(ValueError, match, op, good, text_mask=text_mask)
    raises(TypeError, "text_mask must be bool", op, good, text_mask=randn(3, 5, 4))
    raises(TypeError, "text_mask must be bool", op, good, text_mask=good["text_mask"].int())
