"""scaled_dot_product_attention as `gqa_attention`, with its masks and repeated heads."""

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from lumina_kernels import gqa_attention
from lumina_kernels.dropin.evaluate import VIEWS, evaluate
from lumina_kernels.dropin.graph import (
    Calls,
    Match,
    aten,
    bare,
    is_swap,
    is_tensor,
    packet,
    products,
    size_of,
    sums,
    val,
)

NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
REPEATS = {aten.repeat, aten.repeat_interleave}


def arguments(node) -> dict | None:
    """The arguments of an attention by name, or None."""
    if packet(node) is not aten.scaled_dot_product_attention:
        return None
    given = dict(zip(NAMES, node.args, strict=False)) | dict(node.kwargs)
    return dict.fromkeys((*NAMES, "scale", "enable_gqa")) | given


def attentions(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        if found := _gated_text_of(node):
            yield Match("attention and text", [node], lambda call, a=found: [_emit(call, *a)])
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if arguments(node) is not None:
            yield Match("attention", [node], lambda call, node=node: [_emit(call, node)])


def _emit(call: Calls, node: Node, *text) -> Node:
    """The call of `gqa_attention`, as (B, H, L, K), or (B, L, H, K) with a text branch."""
    a = arguments(node)
    for name in ("dropout_p", "is_causal"):
        if a[name]:
            raise NotImplementedError(f"{name}={a[name]}")
    if val(a["query"]).ndim != 4:
        raise NotImplementedError("not (B, H, L, K)")
    q, (k, v) = _tokens_first(call, a["query"]), _keys(call, a)
    branch = _emit_text(call, *text) if text else (None,) * 4
    key_mask, bias = _masks(call, a["attn_mask"], a["query"])
    out = call(gqa_attention, q, k, v, key_mask, a["scale"], *branch, bias)
    return out if text else call(aten.transpose.int, out, 1, 2)


def _emit_text(call: Calls, node: Node, gate: Node) -> tuple:
    b = arguments(node)
    if b["scale"] and abs(b["scale"] * val(b["query"]).shape[-1] ** 0.5 - 1) > 1e-6:
        raise NotImplementedError("another scale of the text")
    mask, bias = _masks(call, b["attn_mask"], b["query"])
    if bias is not None:
        raise NotImplementedError("a mask of the text that is not one of keys")
    return *_keys(call, b), mask, gate


def _gated_text_of(node) -> tuple[Node, Node, Node] | None:
    """image, text and gate of image + tanh(gate) * text: two attentions of the same queries."""
    for image, term in sums(node):
        for text, gate in products(bare(term)):
            both = [bare(x.args[0]) for x in map(bare, (image, text)) if is_swap(x)]
            a, b = map(arguments, both) if len(both) == 2 else (None, None)
            if a and b and a["query"] is b["query"] and is_tensor(gate):
                tanh = _vector_of_heads(bare(gate), val(a["query"]).shape[1])
                if tanh is not None:
                    return *both, tanh
    return None


def _vector_of_heads(gate: Node, heads: int) -> Node | None:
    """x (H,) of tanh(x) seen as (.., H, 1)."""
    if list(val(gate).shape[-2:]) != [heads, 1] or val(gate).numel() != heads:
        return None
    while packet(gate) in VIEWS:
        gate = gate.args[0]
    x = bare(gate.args[0]) if packet(gate) is aten.tanh else None
    return x if x is not None and list(val(x).shape) == [heads] else None


def _tokens_first(call: Calls, x: Node) -> Node:
    """(B, H, L, K) as (B, L, H, K), without a second transposition."""
    return x.args[0] if is_swap(x) else call(aten.transpose.int, x, 1, 2)


def _keys(call: Calls, a: dict) -> tuple[Node, Node]:
    """Keys and values (B, L_kv, G, K), before their heads were repeated for groups of queries."""
    k, v = (_unrepeated(a[name]) for name in ("key", "value"))
    if k and v and val(k).shape[2] == val(v).shape[2]:
        return k, v
    return _tokens_first(call, a["key"]), _tokens_first(call, a["value"])


def _unrepeated(node: Node) -> Node | None:
    """(B, L, G, K) that repeated heads (B, H, L, K) were made of, G < H."""
    source, (_, H, L, _) = node, val(node).shape
    while packet(source) in VIEWS | REPEATS and is_tensor(source.args[0]):
        source = source.args[0]
        G = val(source).shape[2] if val(source).ndim == 4 else H
        if isinstance(G, int) and G < H and H % G == 0:
            values = evaluate(node, [source], L)
            if values and torch.equal(
                values[node], values[source].repeat_interleave(H // G, 2).transpose(1, 2)
            ):
                return source
    return None


def _masks(call: Calls, mask: Node | None, q: Node) -> tuple[Node | None, Node | None]:
    """key_mask, or bias, for an attn_mask that broadcasts to (B, H, L, L_kv)."""
    if mask is None:
        return None, None
    while val(mask).ndim < 4:
        mask = call(aten.unsqueeze.default, mask, 0)
    for dim in (1, 2):  # what is expanded counts as one
        if val(mask).stride(dim) == 0 and val(mask).shape[dim] != 1:
            mask = call(aten.slice.Tensor, mask, dim, 0, 1)
    if val(mask).dtype != torch.bool:
        return None, mask
    if val(mask).shape[1] == val(mask).shape[2] == 1:
        keys = call(aten.flatten.using_ints, mask, 0, 2)
        return call(aten.expand.default, keys, [size_of(call, q, 0), -1]), None
    zeros = call(aten.zeros_like.default, mask, dtype=val(q).dtype)
    off = call(aten.logical_not.default, mask)
    return None, call(aten.masked_fill.Scalar, zeros, off, float("-inf"))
