"""scaled_dot_product_attention as `gqa_attention`, with its masks and repeated heads."""

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from lumina_kernels import gqa_attention
from lumina_kernels.attention_masks import key_mask_and_bias

from . import graph as g
from .evaluate import VIEWS, evaluate
from .graph import aten, packet, val

REPEATS = {*VIEWS, aten.repeat, aten.repeat_interleave}
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def arguments(node) -> dict | None:
    """The arguments of an attention by name, or None."""
    if packet(node) is not aten.scaled_dot_product_attention:
        return None
    given = dict(zip(NAMES, node.args, strict=False)) | dict(node.kwargs)
    return dict.fromkeys((*NAMES, "scale", "enable_gqa")) | given


def attentions(graph: Graph) -> Iterator[tuple]:
    for node in g.live(graph):
        if found := _gated_text_of(node):
            yield "attention and text", [node], _emit, *found
    for node in g.live(graph):
        if arguments(node):
            yield "attention", [node], _emit, node


def _emit(call: g.Calls, node: Node, text: Node | None = None, gate: Node | None = None) -> Node:
    """The call of `gqa_attention`, as (B, H, L, K), or (B, L, H, K) with a text branch."""
    a, b = arguments(node), arguments(text)
    for name in ("dropout_p", "is_causal"):
        if a[name] or b and b[name]:
            raise NotImplementedError(f"{name}={a[name] or b[name]}")
    if val(a["query"]).ndim != 4:
        raise NotImplementedError("not (B, H, L, K)")
    if g.narrows(a["value"]) and not torch.is_autocast_enabled(val(a["value"]).device.type):
        raise NotImplementedError("in fewer bits than the model, whose rounding would be another")
    q, (k, v), branch = _tokens_first(call, a["query"]), _keys(call, a), (None,) * 4
    K, (key_mask, bias) = val(q).shape[-1], _masks(call, a["attn_mask"], q)
    if text:
        text_mask, text_bias = _masks(call, b["attn_mask"], q)
        if text_bias or abs((b["scale"] or K**-0.5) * K**0.5 - 1) > 1e-6:
            raise NotImplementedError("the text has a bias, or another scale")
        branch = *_keys(call, b), text_mask, gate
    out = call(gqa_attention, q, k, v, key_mask, a["scale"], *branch, bias)
    return out if text else call(aten.transpose.int, out, 1, 2)


def _gated_text_of(node) -> tuple[Node, Node, Node] | None:
    """image, text and gate of image + tanh(gate) * text: two attentions of the same queries."""
    for image, term in g.operands(node, aten.add):
        for text, gate in g.operands(g.bare(term), aten.mul):
            both = [g.bare(x.args[0]) for x in map(g.bare, (image, text)) if g.is_swap(x)]
            a, b = map(arguments, both) if len(both) == 2 else (None, None)
            if a and b and a["query"] is b["query"] and g.is_tensor(gate):
                heads = val(a["query"]).shape[1]
                is_column = list(val(gate).shape[-2:]) == [heads, 1] == [val(gate).numel(), 1]
                while packet(gate) in VIEWS - g.CASTS or g.is_cast(gate):
                    gate = gate.args[0]
                    is_column &= g.is_tensor(gate) and val(gate).numel() == heads
                x = g.bare(gate.args[0]) if packet(gate) is aten.tanh else None
                if is_column and x and list(val(x).shape) == [heads]:
                    return *both, x
    return None


def _tokens_first(call: g.Calls, x: Node) -> Node:
    """(B, H, L, K) as (B, L, H, K), without a second transposition."""
    return x.args[0] if g.is_swap(x) else call(aten.transpose.int, x, 1, 2)


def _keys(call: g.Calls, a: dict) -> tuple[Node, Node]:
    """Keys and values (B, L_kv, G, K), before their heads were repeated for groups of queries."""
    k, v = (unrepeated(a[name]) for name in ("key", "value"))
    if k and v and val(k).shape[2] == val(v).shape[2]:
        return k, v
    return _tokens_first(call, a["key"]), _tokens_first(call, a["value"])


def unrepeated(node: Node) -> Node | None:
    """(B, L, G, K) that repeated heads (B, H, L, K) were made of, G < H."""
    source, (_, H, L, _) = node, val(node).shape
    while packet(source) in REPEATS:
        source = source.args[0]
        G = val(source).shape[2] if g.is_tensor(source) and val(source).ndim == 4 else H
        if isinstance(G, int) and G < H and H % G == 0 and (v := evaluate(node, [source], L)):
            if torch.equal(v[node], v[source].repeat_interleave(H // G, 2).transpose(1, 2)):
                return source
    return None


def _masks(call: g.Calls, mask: Node | None, q: Node) -> tuple[Node | None, Node | None]:
    """key_mask, or bias, for an attn_mask that broadcasts to (B, H, L, L_kv)."""
    if mask is None:
        return None, None
    while val(mask).ndim < 4:
        mask = call(aten.unsqueeze.default, mask, 0)
    for dim in (1, 2):  # what is expanded counts as one
        if val(mask).stride(dim) == 0 and val(mask).shape[dim] != 1:
            mask = call(aten.slice.Tensor, mask, dim, 0, 1)
    pair = call(key_mask_and_bias, mask, q)
    return tuple(
        call(operator.getitem, pair, i) if x is not None else None for i, x in enumerate(val(pair))
    )
