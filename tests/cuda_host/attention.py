"""What tests of attention's CUDA kernels share: what a forward keeps, and how accurate it is."""

from functools import partial

import torch
from common import assert_as_accurate, cast
from ops.attention import eager, logsumexp_of, make_inputs

from lumina_kernels import gqa_attention
from lumina_kernels.ops.gqa_attention import gqa_attention_fwd

op = partial(gqa_attention, backend="cuda")


def saved(inputs, with_error=True):
    """What the forward keeps: out, error, lse and that of the text."""
    names = "q k v key_mask scale text_k text_v text_mask text_gate bias".split()
    scale = inputs["q"].shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    args = [inputs.get(name) for name in names]
    args[4] = scale
    out, error, stats, text = gqa_attention_fwd(*args, with_error, "cuda")
    lse = logsumexp_of(stats, scale if inputs.get("bias") is None else None)
    return out, error, lse, logsumexp_of(text, inputs["q"].shape[-1] ** -0.5) if len(text) else text


def logsumexp(q, k, mask=None, scale=None, bias=None):
    """(B, G, L, R)"""
    R = q.shape[2] // k.shape[2]
    scores = torch.einsum("blhk,bmhk->bhlm", q, k.repeat_interleave(R, 2))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.logsumexp(-1).unflatten(1, (-1, R)).transpose(2, 3)


def assert_lse(lse, low, high):
    assert torch.equal(lse == -torch.inf, high == -torch.inf)
    finite = high.isfinite()
    assert_as_accurate("lse", lse[finite], low[finite], high[finite])


def assert_forward(inputs, dtype):
    """The accuracy rule for the output, and for both lse against float32's."""
    rounded = cast(inputs, dtype)
    wide, float32 = cast(rounded, torch.float64), cast(rounded, torch.float32)
    out, error, lse, text_lse = saved(rounded)
    assert out.dtype == dtype and error.numel() == (0 if dtype == torch.float32 else out.numel())
    assert_as_accurate("out", out, eager(**rounded), gqa_attention(**wide))
    given = (logsumexp(*(x.get(n) for n in ("q", "k", "key_mask", "scale", "bias")))
             for x in (float32, wide))  # fmt: skip
    assert_lse(lse, *given)
    if "text_k" not in inputs:
        assert text_lse.numel() == 0
        return
    given = (logsumexp(*(x.get(n) for n in ("q", "text_k", "text_mask"))) for x in (float32, wide))
    assert_lse(text_lse, *given)


def useful_fraction(cuda_host, run, rows, keys, K, products):
    """The share of what tensor cores could do in the time of the instructions of run(inputs), for
    rows and keys that fill their tiles, that its `products` need."""
    inputs = make_inputs(B=1, L=rows, L_kv=keys, H=1, G=1, K=K, text=False) | {"key_mask": None}
    before = cuda_host.count("multiply_adds")
    run(cast(inputs, torch.float16))
    return products * rows * keys * K / (cuda_host.count("multiply_adds") - before)


def assert_masked_tiles_are_not_read(cuda_host, run, L, L_kv, valid):
    """A prefix of valid keys costs what those keys alone cost, but for the masks."""
    inputs = make_inputs(B=1, L=L, L_kv=L_kv, H=4, G=1, K=72, text=False)
    inputs = cast(inputs, torch.float16) | {"key_mask": torch.arange(L_kv)[None] < valid}
    alone = {n: inputs[n][:, :valid] for n in ("k", "v")} | {"key_mask": None}

    def bytes_read(inputs):
        before = cuda_host.count("bytes_read")
        run(inputs)
        return cuda_host.count("bytes_read") - before

    assert bytes_read(inputs) < 1.05 * bytes_read(inputs | alone)
