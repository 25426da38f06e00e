"""Inputs of gqa_attention, and its operations one by one, for several files of tests."""

import math

import torch
from common import DEVICE, randn

from lumina_kernels.ops.gqa_attention import LSE_FLOOR


def make_mask(B, L):
    """Holes that differ between samples; the last sample has no valid key at all."""
    mask = torch.arange(B * L, device=DEVICE).view(B, L) % 3 != 1
    mask[-1:] = False
    return mask


def make_inputs(B=3, L=5, L_kv=7, T=4, H=8, G=2, K=24, text=True):
    inputs = {"q": randn(B, L, H, K), "k": randn(B, L_kv, G, K), "v": randn(B, L_kv, G, K)}
    inputs |= {"key_mask": make_mask(B, L_kv), "scale": 0.3}
    if text:
        inputs |= {"text_k": randn(B, T, G, K), "text_v": randn(B, T, G, K)}
        inputs |= {"text_mask": make_mask(B, T).roll(1, 0), "text_gate": randn(H)}
    return inputs


def mask_of_ranges(L_kv, *ranges):
    """Two samples whose valid keys are `ranges`, counted from the end in the second one."""
    mask = torch.zeros(2, L_kv, dtype=torch.bool, device=DEVICE)
    for first, last in ranges:
        mask[0, first:last] = True
    mask[1] = mask[0].flip(0)
    return mask


def logsumexp_of(stats, scale):
    """Of the scores of a row, by what a forward keeps of it; scale is None where there was a bias,
    else its split is csrc/split_scale.h's."""
    top, log2_total = stats.unbind(-1)
    rest = 1 if scale is None else abs(scale) / 2.0 ** ((math.frexp(scale)[1] - 1) // 2 - 1)
    lse = top * rest + log2_total * math.log(2)
    return lse.masked_fill(log2_total == torch.inf, -torch.inf)


def logsumexp(q, k, bias, key_mask, scale):
    """Of the scores, (B, L, H), the floor without a valid key."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("blhk,bmhk->bhlm", q, k) * scale
    scores = scores if bias is None else scores + bias
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    empty = (scores == -torch.inf).all(-1)
    lse = scores.masked_fill(empty[..., None], 0).logsumexp(-1)
    return lse.masked_fill(empty, LSE_FLOOR).transpose(1, 2)


def eager(
    q, k, v, key_mask=None, scale=None, text_k=None, text_v=None, text_mask=None, text_gate=None,
    bias=None, return_lse=False,
):  # fmt: skip
    """Products and softmax as separate operations, each rounded to the dtype; the log-sum-exp is
    float32's."""

    def attend(k, v, mask, scale, bias):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(2, 3) * scale
        scores = scores if bias is None else scores + bias
        if mask is not None:
            mask = mask[:, None] if mask.ndim == 2 else mask
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        return (weights.to(v.dtype) @ v).transpose(1, 2)

    plain = q.shape[-1] ** -0.5
    scale = plain if scale is None else scale
    out = attend(k, v, key_mask, scale, bias)
    if return_lse:
        acc = torch.promote_types(q.dtype, torch.float32)
        wide = (None if x is None else x.to(acc) for x in (q, k, bias))
        return out, logsumexp(*wide, key_mask, scale)
    if text_k is None:
        return out
    return out + torch.tanh(text_gate)[:, None] * attend(text_k, text_v, text_mask, plain, None)
