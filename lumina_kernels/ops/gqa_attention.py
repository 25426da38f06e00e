"""Grouped-query attention with key masks and a gated second softmax over the text."""

from typing import Annotated

import torch
from torch import Tensor

from lumina_kernels.axes import Heads
from lumina_kernels.backend import BEST_FIRST, resolve, wants_grad
from lumina_kernels.checks import (
    are_like,
    check_axes,
    check_broadcasts,
    check_float,
    check_mask,
    check_same_dtype,
)
from lumina_kernels.kernel_op import kernel_op, like

MAX_HEAD_DIM = 256  # what the tiles of the kernels hold
# The log-sum-exp of a row without a valid key (csrc/split_scale.h has it too). It is far below that
# of others, so that a merge gives such a part no weight. It is no -inf, from which merges make NaN,
# and not huge: `lse - logsigmoid(lse - other)`, the usual merge, would lose `other` in rounding.
LSE_FLOOR = -2000.0
Keys, KeyMask = Annotated[Tensor, "B M H K"], Annotated[Tensor, "B M"]
Text, TextMask = Annotated[Tensor, "B T H K"], Annotated[Tensor, "B [L] T"]
Gate, Bias = Annotated[Tensor, "H"], Annotated[Tensor, "[B] [H] [L] [M]"]
SoftmaxStats, Lse = Annotated[Tensor, "B H L R S"], Annotated[Tensor, "B L H"]


def gqa_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None,
    text_k: Tensor | None = None, text_v: Tensor | None = None, text_mask: Tensor | None = None,
    text_gate: Tensor | None = None, bias: Tensor | None = None, *, return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Return softmax(scale q kᵀ + bias) v + tanh(text_gate) * softmax(q text_kᵀ / sqrt(K)) text_v.

    Query head h reads key/value head h // (H / G) (grouped queries, arXiv 2305.13245). The second
    term is Lumina-Next's text branch (arXiv 2406.18583): the same queries, a softmax of its own,
    always scaled by 1/sqrt(K), one gate per head. Without text_k it is left out. A row with no
    valid key, by mask or by a bias of -inf, adds 0 and has zero gradients; in each term by itself.

    Args:
        q: queries, (B, L, H, K).
        k, v: keys and values, (B, L_kv, G, K), same dtype; G divides H.
        key_mask: True for keys that count, (B, L_kv) bool, any pattern. What is masked must still
            be finite.
        scale: of q kᵀ; None is 1/sqrt(K).
        text_k, text_v: keys and values of the text, (B, T, G, K), same dtype.
        text_mask: True for text tokens that count, (B, T) bool, or (B, L, T) where every query has
            text of its own (regional prompts). Any strides, an expanded one is not copied.
        text_gate: gate before the tanh, (H,).
        bias: added to the scaled scores, broadcastable to (B, H, L, L_kv). A float mask is a bias.
        return_lse: return the log-sum-exp of the scores, too, by which `merge_attention` joins
            attentions to parts of the keys. Not with text, see Raises.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        (B, L, H, K) in q.dtype. The arithmetic is float32 (float64 for float64), also under
        autocast, rounded once. With return_lse also log(sum of exp(scale q kᵀ + bias)) over the
        valid keys, (B, L, H) float32 (float64 for float64), differentiable; -2000 in a row without
        one.

    Raises:
        ValueError, TypeError: a shape, device or dtype is not as above, or text_k, text_v and
            text_gate do not come together; or return_lse comes with text, which a merge would
            weigh as if it were part of the keys. Call with return_lse and without text, merge, and
            add the text's term, which is that of a call with `k[:, :0], v[:, :0]` and text.
        NotImplementedError: the backend that was asked for takes no head_dim above 256, or is
            "triton" on a GPU that its tiles do not fit.
    """
    _check(q, k, v, key_mask, bias)
    _check_text(q, k, text_k, text_v, text_mask, text_gate)
    floats = (q, k, v, text_k, text_v, text_gate, bias)
    with_grad = wants_grad(*floats)
    refused = _refusals(q.shape[-1])
    backend = resolve(backend, BEST_FIRST, *floats, refused=refused, op="gqa_attention")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if return_lse and text_k is not None:
        raise ValueError("return_lse takes no text, which a merge would weigh: add it afterwards")
    inputs = q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate, bias
    if backend == "torch":
        return gqa_attention_ref(*inputs, return_lse=return_lse)
    if return_lse:
        return gqa_attention_lse_fwd(q, k, v, key_mask, scale, bias, with_grad, backend)[:2]
    return gqa_attention_fwd(*inputs, with_grad, backend)[0]


def gqa_attention_ref(
    q, k, v, key_mask=None, scale=None, text_k=None, text_v=None, text_mask=None, text_gate=None,
    bias=None, *, return_lse=False,
):  # fmt: skip
    """The definition. It holds the scores, O(H L L_kv) numbers per sample."""
    default = q.shape[-1] ** -0.5
    out, lse = _attend(q, k, v, default if scale is None else scale, key_mask, bias, return_lse)
    if text_k is not None:
        text, _ = _attend(q, text_k, text_v, default, text_mask, None)
        out = out + torch.tanh(text_gate.to(out.dtype)).unsqueeze(-1) * text
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _refusals(K) -> dict[str, str]:
    if K <= MAX_HEAD_DIM:
        return {}
    return dict.fromkeys(BEST_FIRST, f"takes a head_dim of at most {MAX_HEAD_DIM}, got {K}")


def _attend(q, k, v, scale, key_mask, bias, with_lse=False):
    """softmax(scale q kᵀ + bias) v over the valid keys, not yet rounded, and the log-sum-exp."""
    acc = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(acc).repeat_interleave(group, 2) for x in (k, v))  # (B, L_kv, H, K)
    # Autocast would multiply in 16 bits. It does not know the device "meta".
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        scores = torch.einsum("blhk,bmhk->bhlm", q.to(acc), k) * scale
        if bias is not None:
            scores = scores + bias.to(acc)
        if key_mask is not None:
            rows = key_mask.unsqueeze(1) if key_mask.ndim == 2 else key_mask  # (B, 1 or L, L_kv)
            scores = scores.masked_fill(~rows.unsqueeze(1), -torch.inf)
        # A softmax over -inf alone is NaN, in the backward too: such rows take part as zeros.
        empty = (scores == -torch.inf).all(-1, keepdim=True)  # (B, H, L, 1)
        scores = scores.masked_fill(empty, 0)
        weights, lse = scores.softmax(-1).masked_fill(empty, 0), None
        if with_lse:
            lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), LSE_FLOOR).transpose(1, 2)
        return torch.einsum("bhlm,bmhk->blhk", weights, v), lse


def _check(q, k, v, key_mask, bias) -> None:
    check_axes("q", q, "B, L, H, K")
    check_axes("k", k, "B, L_kv, G, K")
    (B, L, H, K), (_, L_kv, G, _), device = q.shape, k.shape, q.device
    shape = B, L_kv, G, K
    if G == 0 or H % G or not are_like(q.dtype, device, shape, k, v):
        check_float("k", k, device, shape)
        if G == 0 or H % G:
            raise ValueError(f"k must have a number of heads that divides the {H} of q, got {G}")
        check_float("v", v, device, shape)
        check_same_dtype(q=q, k=k, v=v)
    check_mask("key_mask", key_mask, device, (B, L_kv))
    check_broadcasts("bias", bias, device, (B, H, L, L_kv))


def _check_text(q, k, text_k, text_v, text_mask, text_gate) -> None:
    if text_k is text_v is text_mask is text_gate is None:
        return
    if text_k is None or text_v is None or text_gate is None:
        text = {"text_k": text_k, "text_v": text_v, "text_gate": text_gate}
        missing = next(name for name, tensor in text.items() if tensor is None)
        raise ValueError(f"text_k, text_v and text_gate come together, {missing} is None")
    check_axes("text_k", text_k, "B, T, G, K")
    (B, L, H, K), T, device = q.shape, text_k.shape[1], q.device
    shape = (B, T, k.shape[2], K)
    if not are_like(q.dtype, device, shape, text_k, text_v):
        check_float("text_k", text_k, device, shape)
        check_float("text_v", text_v, device, shape)
        check_same_dtype(q=q, text_k=text_k, text_v=text_v)
    check_float("text_gate", text_gate, device, (H,))
    check_mask("text_mask", text_mask, device, (B, T), (B, L, T))


@kernel_op("out error stats text_stats", over="B L H")
def gqa_attention_fwd(
    q: Heads, k: Keys, v: Keys, key_mask: KeyMask | None, scale: float, text_k: Text | None,
    text_v: Text | None, text_mask: TextMask | None, text_gate: Gate | None, bias: Bias | None,
    with_error: bool,
) -> tuple[Heads, Heads, SoftmaxStats, SoftmaxStats]:  # fmt: skip
    """error: the rounding error of a 16-bit output, int8; empty for float32, or if not wanted.
    stats, text_stats: of each row the largest inner * q kᵀ (csrc/split_scale.h) or, with a bias,
    score; and log2 of the sum of weights of which the largest is 1. (0, inf) for a row without a
    valid key; text_stats is empty without text."""
    (B, L, H, _), G = q.shape, k.shape[2]
    stats = q.new_empty((B, G, L, H // G, 2), dtype=torch.float32)
    error = q.new_empty(q.shape if with_error and q.itemsize == 2 else 0, dtype=torch.int8)
    text_stats = None if text_k is None else stats.new_empty(stats.shape)
    return q.new_empty(q.shape), error, stats, text_stats


@gqa_attention_fwd.backward("dq dk dv dtext_k dtext_v dtext_gate dbias")
def gqa_attention_bwd(
    dout, out, error, stats, text_stats, q, k, v, key_mask, scale, text_k, text_v, text_mask,
    text_gate, bias, needs_bias,
):  # fmt: skip
    return like(q, k, v, text_k, text_v, text_gate, bias if needs_bias else None)


@kernel_op("out lse error stats", over="B L H")
def gqa_attention_lse_fwd(
    q: Heads, k: Keys, v: Keys, key_mask: KeyMask | None, scale: float, bias: Bias | None,
    with_error: bool,
) -> tuple[Heads, Lse, Heads, SoftmaxStats]:  # fmt: skip
    """As gqa_attention_fwd, without text, and the natural log-sum-exp, LSE_FLOOR without a key."""
    inputs = q, k, v, key_mask, scale, None, None, None, None, bias, with_error
    out, error, stats, _ = gqa_attention_fwd.fake(*inputs)
    return out, stats.new_empty(q.shape[:3]), error, stats


@gqa_attention_lse_fwd.backward("dq dk dv dbias")
def gqa_attention_lse_bwd(
    dout, dlse, out, error, stats, q, k, v, key_mask, scale, bias, needs_bias,
):  # fmt: skip
    """The gradient of a score from that of the log-sum-exp is P dlse: it is subtracted from e."""
    return like(q, k, v, bias if needs_bias else None)


@gqa_attention_fwd.flops
def gqa_attention_flops(q, k, v, key_mask, scale, text_k, *rest, **kwargs) -> int:
    """Of the two products with every key, masked or not: 4 B H L L_kv K, and the same for text."""
    (B, L, H, K), keys = q, k[1] + (text_k[1] if text_k else 0)
    return 4 * B * H * L * keys * K


@gqa_attention_bwd.flops
def gqa_attention_bwd_flops(dout, out, error, stats, text_stats, *inputs, **kwargs) -> int:
    """Twice the forward's. The recomputation of the scores is not counted."""
    return 2 * gqa_attention_flops(*inputs)


@gqa_attention_lse_fwd.flops
def gqa_attention_lse_flops(q, k, v, key_mask, scale, *rest, **kwargs) -> int:
    return gqa_attention_flops(q, k, v, key_mask, scale, None)


@gqa_attention_lse_bwd.flops
def gqa_attention_lse_bwd_flops(dout, dlse, out, error, stats, *inputs, **kwargs) -> int:
    return 2 * gqa_attention_lse_flops(*inputs)
