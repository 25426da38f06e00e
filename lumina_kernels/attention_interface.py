"""`gqa_attention` in the models of transformers, through its registry of attentions.

After `register()`, `model.set_attn_implementation("lumina")` or
`from_pretrained(..., attn_implementation="lumina")` chooses it.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from lumina_kernels import gqa_attention
from lumina_kernels.attention_masks import key_mask_and_bias
from lumina_kernels.ops.gqa_attention import MAX_HEAD_DIM


def register(name: str = "lumina") -> None:
    """Make `attn_implementation=name` available to every model of transformers."""
    AttentionInterface.register(name, lumina_attention)
    AttentionMaskInterface.register(name, lumina_mask)


def lumina_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
    sliding_window: int | None = None, softcap: float | None = None,
    position_bias: Tensor | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of transformers by `gqa_attention`, with its masks and grouped heads.

    What the op does not compute is left to others, with the same result: a plain causal mask,
    dropout, a head_dim above 256 and one that differs in `value` to "sdpa", softcap to PyTorch.

    Args:
        module: is read for `is_causal`, if that is None.
        query: (B, H, L, K).
        key, value: (B, G, L_kv, K); G divides H.
        attention_mask: broadcasts to (B, H, L, L_kv); bool (True is attended to) or floating
            (added to the scores). None is causal, if `is_causal` and L > 1.
        dropout, scaling: of the weights; of query keyᵀ, None is 1/sqrt(K).
        sliding_window: keys that a query sees of a causal mask which is not given.
        softcap: bounds the scaled scores s, softcap * tanh(s / softcap).
        position_bias: added to the scores, broadcasts to (B, H, L, L_kv).
        kwargs: what "sdpa" does not read either.

    Returns:
        (B, L, H, K), and None for the weights, which are never formed.

    Raises:
        ValueError, TypeError: a shape, device or dtype is not as above.
        NotImplementedError: the model has attention sinks.
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError('"lumina" computes no attention sinks, use "eager"')
    if attention_mask is not None and attention_mask.ndim != 4:
        raise ValueError(
            f"attention_mask must have shape (B, H, L, L_kv), got {tuple(attention_mask.shape)}"
        )
    L, L_kv = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = is_causal and attention_mask is None and L > 1
    if causal and (softcap is not None or sliding_window is not None):
        # Keys after the queries are room in a static cache.
        band = torch.ones(L, L_kv, dtype=torch.bool, device=query.device).tril()
        band = band if sliding_window is None else band.triu(1 - sliding_window)
        attention_mask, causal = band[None, None], False
    if softcap is None and (
        causal or dropout or query.shape[-1] != value.shape[-1] or query.shape[-1] > MAX_HEAD_DIM
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, causal,
            position_bias=position_bias,
        )  # fmt: skip
    if torch.is_autocast_enabled(query.device.type):  # as it does for PyTorch's attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key_mask = bias = None
    if attention_mask is not None:
        key_mask, bias = key_mask_and_bias(attention_mask, query)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None:
        return _softcapped(query, key, value, key_mask, bias, scale, softcap, dropout), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return gqa_attention(q, k, v, key_mask, scale, bias=bias), None


def _softcapped(query, key, value, key_mask, bias, scale, softcap, dropout):
    """What no op computes, as the models' own attention does. Returns (B, L, H, K)."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * scale / softcap)
    lowest = torch.finfo(scores.dtype).min  # a row of -inf would be NaN
    if bias is not None:
        scores = (scores + bias).clamp(min=lowest)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], lowest)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (nn.functional.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()


def lumina_mask(**kwargs) -> Tensor | None:
    """The mask of "sdpa"; of an encoder, where all queries see the same keys, (B, 1, 1, L_kv)."""
    padding, n = kwargs["attention_mask"], kwargs["kv_length"]
    is_key_mask = kwargs["mask_function"] is bidirectional_mask_function and padding is not None
    # Who wants no None in its place computes with the mask, and expects the whole of it.
    if not is_key_mask or not kwargs.get("allow_is_bidirectional_skip"):
        return sdpa_mask(**kwargs)
    keys = padding[:, kwargs["kv_offset"] :][:, :n]
    return nn.functional.pad(keys, (0, n - keys.shape[1]))[:, None, None]
