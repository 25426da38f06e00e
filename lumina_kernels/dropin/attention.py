"""scaled_dot_product_attention as `gqa_attention`, with its masks and repeated heads."""

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from lumina_kernels import gqa_attention
from lumina_kernels.dropin.graph import (
    aten,
    bare,
    call,
    is_tensor,
    packet,
    products,
    size_of,
    sums,
    val,
)
from lumina_kernels.ops.gqa_attention import MAX_HEAD_DIM

NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def arguments(node) -> dict | None:
    """The arguments of an attention by name, or None."""
    if packet(node) is not aten.scaled_dot_product_attention:
        return None
    given = dict(zip(NAMES, node.args, strict=False)) | dict(node.kwargs)
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    return {**defaults, "enable_gqa": False, **given}


def refusal(node: Node) -> str | None:
    """Why an attention stays as it is, or None."""
    a = arguments(node)
    shapes = [val(a[name]).shape for name in NAMES[:3]]
    if any(len(shape) != 4 for shape in shapes):
        return "not (B, H, L, K)"
    if a["dropout_p"]:
        return "dropout"
    if a["is_causal"]:
        return "causal"
    if shapes[0][-1] != shapes[2][-1]:
        return "head_dim of v differs"
    if shapes[0][-1] > MAX_HEAD_DIM:
        return f"head_dim above {MAX_HEAD_DIM}"
    if not all(isinstance(shape[1], int) for shape in shapes):
        return "number of heads is not fixed"
    if any(val(a[name]).dtype != val(a["query"]).dtype for name in NAMES[1:3]):
        return "dtypes differ"
    return None


def emit(graph: Graph, node: Node) -> Node:
    """The call of `gqa_attention`, as (B, H, L, K)."""
    a = arguments(node)
    q, (k, v) = heads_first(graph, a["query"]), _keys(graph, a)
    key_mask, bias = masks(graph, a["attn_mask"], a["query"])
    out = call(graph, gqa_attention, q, k, v, key_mask, a["scale"], bias=bias)
    return call(graph, aten.transpose.int, out, 1, 2)


def _keys(graph: Graph, a: dict) -> tuple[Node, Node]:
    """Keys and values (B, L_kv, G, K)."""
    k, v = (heads_first(graph, a[name]) for name in ("key", "value"))
    groups = [unrepeated(x, 2) for x in (k, v)]
    if None in groups or val(groups[0]).shape[2] != val(groups[1]).shape[2]:
        return k, v
    return tuple(groups)


@dataclass(frozen=True)
class GatedText:
    """image + tanh(gate) * text: two attentions of the same queries, as (B, L, H, K)."""

    image: Node
    text: Node
    gate: Node  # (H,), before the tanh


def gated_text_of(node) -> GatedText | None:
    """What sum of two attentions a node is, if it is one."""
    for image, term in sums(node):
        for text, gate in products(bare(term)):
            image, text, gate = (bare(x) for x in (image, text, gate))
            if not (is_swap(image) and is_swap(text) and is_tensor(gate)):
                continue
            both = bare(image.args[0]), bare(text.args[0])
            a, b = map(arguments, both)
            if a is None or b is None or any(map(refusal, both)):
                continue
            H, K = val(a["query"]).shape[1], val(a["query"]).shape[3]
            tanh = _vector_of_heads(gate, H)
            same = bare(a["query"]) is bare(b["query"]) and a["query"] is b["query"]
            scaled = b["scale"] is None or abs(b["scale"] * K**0.5 - 1) < 1e-6
            if tanh is not None and same and scaled and _is_key_mask(b["attn_mask"]):
                return GatedText(*both, tanh)
    return None


def _vector_of_heads(gate: Node, heads: int) -> Node | None:
    """x (H,) of tanh(x) seen as (.., H, 1)."""
    shape = [n for n in val(gate).shape]
    if len(shape) < 2 or shape[-2:] != [heads, 1] or val(gate).numel() != heads:
        return None
    while packet(gate) in (aten.view, aten.reshape, aten.unsqueeze, aten.select, aten.slice):
        gate = bare(gate.args[0])
    x = bare(gate.args[0]) if packet(gate) is aten.tanh else None
    return x if x is not None and list(val(x).shape) == [heads] else None


def _is_key_mask(mask: Node | None) -> bool:
    if mask is None:
        return True
    x = val(mask)
    constant = all(x.shape[d] == 1 or x.stride(d) == 0 for d in range(1, x.ndim - 1))
    return x.dtype == torch.bool and x.ndim == 4 and constant


def emit_gated_text(graph: Graph, found: GatedText) -> Node:
    """The call of `gqa_attention` with its text branch, as (B, L, H, K)."""
    a, b = arguments(found.image), arguments(found.text)
    q = heads_first(graph, a["query"])
    key_mask, bias = masks(graph, a["attn_mask"], a["query"])
    text_mask, _ = masks(graph, b["attn_mask"], b["query"])
    return call(
        graph, gqa_attention, q, *_keys(graph, a), key_mask, a["scale"], *_keys(graph, b),
        text_mask, found.gate, bias,
    )  # fmt: skip


def heads_first(graph: Graph, x: Node) -> Node:
    """(B, H, L, K) as (B, L, H, K), without a second transposition or repeated heads in between."""
    if is_swap(x):
        return x.args[0]
    inner = unrepeated(x, 1)
    if inner is not None:
        n = val(x).shape[1] // val(inner).shape[1]
        inner = heads_first(graph, inner)
        return call(graph, aten.repeat_interleave.self_int, inner, n, 2)
    return call(graph, aten.transpose.int, x, 1, 2)


def is_swap(node) -> bool:
    """Whether a node exchanges the dimensions 1 and 2 of 4."""
    if not is_tensor(node) or val(node).ndim != 4:
        return False
    if packet(node) is aten.transpose:
        return {d % 4 for d in node.args[1:3]} == {1, 2}
    return packet(node) is aten.permute and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]


def unrepeated(node: Node, dim: int) -> Node | None:
    """Heads, which are dimension `dim`, before each was repeated for its group of queries."""
    if packet(node) is aten.repeat_interleave:
        x, n, *axis = node.args
        return x if isinstance(n, int) and axis and axis[0] % 4 == dim else None
    if packet(node) not in (aten.flatten, aten.reshape, aten.view, aten._unsafe_view):
        return None
    repeated = bare(node.args[0])
    if packet(repeated) not in (aten.expand, aten.repeat):
        return None
    single = bare(repeated.args[0])
    if packet(single) is not aten.unsqueeze or single.args[1] % val(single).ndim != dim + 1:
        return None
    x, shape, wide = single.args[0], val(single).shape, val(repeated).shape
    others = [i for i in range(5) if i != dim + 1]
    same = len(wide) == 5 and all(str(shape[i]) == str(wide[i]) for i in others)
    return x if same and val(node).shape[dim] == wide[dim] * wide[dim + 1] else None


def masks(graph: Graph, mask: Node | None, q: Node) -> tuple[Node | None, Node | None]:
    """key_mask, or bias, for an attn_mask that broadcasts to (B, H, L, L_kv)."""
    if mask is None:
        return None, None
    while val(mask).ndim < 4:
        mask = call(graph, aten.unsqueeze.default, mask, 0)
    B = size_of(graph, q, 0)
    for dim in (1, 2):  # what is expanded counts as one
        if val(mask).stride(dim) == 0 and val(mask).shape[dim] != 1:
            mask = call(graph, aten.slice.Tensor, mask, dim, 0, 1)
    if val(mask).dtype != torch.bool:
        return None, mask
    if val(mask).shape[1] == val(mask).shape[2] == 1:
        keys = call(graph, aten.select.int, call(graph, aten.select.int, mask, 1, 0), 1, 0)
        return call(graph, aten.expand.default, keys, [B, -1]), None
    zeros = call(graph, aten.zeros_like.default, mask, dtype=val(q).dtype)
    off = call(graph, aten.logical_not.default, mask)
    return None, call(graph, aten.masked_fill.Scalar, zeros, off, float("-inf"))
