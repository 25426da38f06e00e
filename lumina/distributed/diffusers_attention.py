"""`gqa_attention` as an attention backend of diffusers, on one process and on several.

B batch, L tokens, C tokens of a rank, H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from torch import Tensor

from lumina.distributed.exchange import all_gather, gathered
from lumina.distributed.sequence import SequenceParallel
from lumina_kernels import gqa_attention
from lumina_kernels.attention_masks import key_mask_and_bias

BACKEND = "lumina"


def register_backend() -> None:
    """Let `set_attention_backend("lumina")` and diffusers' dispatch find `lumina_attention`."""
    names = AttentionBackendName
    if BACKEND not in names._value2member_map_:  # a closed Enum, and diffusers has no other door
        member = str.__new__(names, BACKEND)
        member._name_, member._value_ = BACKEND.upper(), BACKEND
        member._sort_order_ = len(names._member_names_)
        type.__setattr__(names, member.name, member)
        names._member_names_.append(member.name)
        names._member_map_[member.name] = names._value2member_map_[BACKEND] = member
    add = _AttentionBackendRegistry.register(names(BACKEND), supports_context_parallel=True)
    add(lumina_attention)


def sequence_parallel(config) -> SequenceParallel:
    """Of a `ContextParallelConfig` that `enable_parallelism` has set up."""
    return SequenceParallel(config._ring_mesh.get_group(), config._ulysses_mesh.get_group())


def lumina_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, return_lse: bool = False, _parallel_config=None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of diffusers by `gqa_attention`; with a context parallel config, of the rank's
    queries to the keys of all ranks.

    Args:
        query: (B, L, H, K); in parallel the rank's, (B, C, H, K).
        key, value: (B, L_kv, G, K); in parallel the rank's. G divides H, with or without
            enable_gqa, and may be less than the ranks.
        attn_mask: (B, L_kv), or broadcasts to (B, H, L, L_kv); bool (True is attended to) or
            floating (added to the scores). In parallel of the rank's keys or of those of all ranks,
            the same for all queries and, in self-attention, for all heads.
        scale: None is 1/sqrt(K).
        return_lse: return the natural log-sum-exp, (B, L, H) float32, too.

    Raises:
        NotImplementedError: causal attention or dropout; in parallel return_lse, chunks of unequal
            length ("anything"), or a mask of pairs of tokens.
        ValueError, TypeError: a shape or dtype is not as above.
    """
    if is_causal or dropout_p:
        raise NotImplementedError(f'"{BACKEND}" has no causal attention and no dropout')
    context = getattr(_parallel_config, "context_parallel_config", None)
    if context is not None:
        if return_lse or context.ulysses_anything or context.ring_anything:
            raise NotImplementedError(
                f'"{BACKEND}" takes no return_lse, ulysses_anything or ring_anything in parallel'
            )
        if scale is not None and scale != (usual := query.shape[-1] ** -0.5):
            query = query * (scale / usual)
        return _in_parallel(query, key, value, attn_mask, sequence_parallel(context))
    key_mask, bias = _key_mask_and_bias(attn_mask, query, key.shape[1])
    return gqa_attention(query, key, value, key_mask, scale, bias=bias, return_lse=return_lse)


def _in_parallel(q, k, v, mask, parallel) -> Tensor:
    C, size = k.shape[1], parallel.size
    if mask is not None and mask.shape[-1] == C * size:  # of all ranks
        mask = mask.chunk(size, -1)[parallel.rank]
    key_mask, bias = _key_mask_and_bias(mask, q, C)
    is_self = C == q.shape[1]
    if bias is not None and (bias.shape[2] > 1 or is_self and bias.shape[1] > 1):
        raise NotImplementedError(
            f'"{BACKEND}" takes masks of keys in parallel, got one of shape {tuple(mask.shape)}'
        )
    if is_self:
        return parallel.attention(q, k, v, key_mask, bias=bias)
    for group in (parallel.ulysses, parallel.ring):  # to a text, which is short
        if group is not None:
            k, v = (gathered(x, 1, group) for x in (k, v))
            key_mask = None if key_mask is None else all_gather(key_mask, 1, group)
            bias = None if bias is None else gathered(bias, 3, group)
    return gqa_attention(q, k, v, key_mask, bias=bias)


def _key_mask_and_bias(mask, q, L_kv):
    if mask is None:
        return None, None
    if mask.shape == (q.shape[0], L_kv):
        mask = mask[:, None, None]
    if mask.ndim != 4 or mask.shape[-1] != L_kv:
        raise ValueError(
            f"attn_mask must be (B, L_kv) or (B, H, L, L_kv) with L_kv = {L_kv}, "
            f"got {tuple(mask.shape)}"
        )
    return key_mask_and_bias(mask, q)


class LuminaNextProcessor(LuminaAttnProcessor2_0):
    """Self-attention of Lumina-Next by diffusers' dispatch, which its own processor goes around.

    tokens: where the number of all tokens is found, on which the scale may depend.
    """

    _attention_backend, _parallel_config = BACKEND, None

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None, query_rotary_emb: Tensor | None = None,
        key_rotary_emb: Tensor | None = None, base_sequence_length: int | None = None,
    ) -> Tensor:  # fmt: skip
        q, k, v = _projected(attn, hidden_states, encoder_hidden_states)
        q, k = _normed(attn, q, k)
        K = q.shape[-1] // attn.heads
        q, k, v = (x.unflatten(-1, (-1, K)) for x in (q, k, v))
        rotations = query_rotary_emb, key_rotary_emb
        return _dispatch(self, q, k, v, attention_mask, rotations, base_sequence_length)


class Lumina2Processor(Lumina2AttnProcessor2_0):
    """Self-attention of Lumina 2 by diffusers' dispatch; see `LuminaNextProcessor`."""

    _attention_backend, _parallel_config = BACKEND, None

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None, image_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:  # fmt: skip
        q, k, v = _projected(attn, hidden_states, encoder_hidden_states)
        K = q.shape[-1] // attn.heads
        q, k, v = (x.unflatten(-1, (-1, K)) for x in (q, k, v))
        q, k = _normed(attn, q, k)
        rotations = image_rotary_emb, image_rotary_emb
        out = _dispatch(self, q, k, v, attention_mask, rotations, base_sequence_length)
        for layer in attn.to_out:
            out = layer(out if out.ndim == 3 else out.flatten(2))
        return out


def _projected(attn, x, context):
    return attn.to_q(x), attn.to_k(context), attn.to_v(context)


def _normed(attn, q, k):
    q = q if attn.norm_q is None else attn.norm_q(q)
    return q, k if attn.norm_k is None else attn.norm_k(k)


def _dispatch(processor, q, k, v, mask, rotations, base_length):
    of_q, of_k = rotations
    if base_length is not None:  # sqrt(log_base L), in the rotation, which is rounded anyhow
        of_q = of_q * math.sqrt(math.log(processor.tokens.length, base_length))
    q = apply_rotary_emb(q, of_q, use_real=False).to(v.dtype)
    k = apply_rotary_emb(k, of_k, use_real=False).to(v.dtype)
    return dispatch_attention_fn(
        q, k, v, attn_mask=None if mask is None else mask.to(torch.bool), enable_gqa=True,
        backend=processor._attention_backend, parallel_config=processor._parallel_config,
    )  # fmt: skip
