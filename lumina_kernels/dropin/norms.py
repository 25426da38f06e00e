"""Norms with their affine parameters and adaLN modulation, as `norm_modulate`."""

from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from lumina_kernels import norm_modulate
from lumina_kernels.dropin.graph import (
    as_rows,
    aten,
    bare,
    broadcasts,
    call,
    in_dtype,
    is_cast,
    is_one_plus,
    is_tensor,
    is_vector,
    operands,
    packet,
    products,
    sums,
    unwidened,
    val,
)


@dataclass(frozen=True)
class Norm:
    """(norm(x) * weight + bias) * (1 + scale) + shift, each term a node or None."""

    x: Node
    kind: str
    eps: float
    weight: Node | None = None
    bias: Node | None = None
    scale: Node | None = None
    shift: Node | None = None

    @property
    def is_plain_rms(self) -> bool:
        return self.kind == "rms" and self.bias is self.shift is None


def norm_of(node) -> Norm | None:
    """What norm a node is, if it is one."""
    if not is_tensor(node):
        return None
    if is_cast(node):
        return norm_of(node.args[0])
    found = _layer_norm(node) or _rms_norm(node) or _written_out(node)
    if found is not None:
        return found
    for normed, factor in products(node):
        if (n := norm_of(normed)) and (found := _scaled(n, factor)):
            return found
    for normed, term in sums(node):
        if (n := norm_of(normed)) and (found := _shifted(n, term)):
            return found
    if packet(node) is aten.addcmul and not node.kwargs:
        term, *pair = node.args
        for normed, factor in (pair, pair[::-1]):
            n = norm_of(normed)
            if n and (n := _scaled(n, factor)) and (found := _shifted(n, term)):
                return found
    return None


def _layer_norm(node) -> Norm | None:
    if packet(node) is not aten.layer_norm:
        return None
    x, shape, weight, bias, eps, *_ = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])
    return Norm(x, "layer", eps, weight, bias) if len(shape) == 1 else None


def _rms_norm(node) -> Norm | None:
    if packet(node) is not aten.rms_norm:
        return None
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if eps is None:
        eps = torch.finfo(torch.promote_types(val(x).dtype, torch.float32)).eps
    return Norm(x, "rms", eps, weight) if len(shape) == 1 else None


def _written_out(node) -> Norm | None:
    """x * rsqrt(mean(x²) + eps)"""
    for x, root in products(node):
        inverse = bare(root)
        if packet(inverse) is not aten.rsqrt:
            continue
        for mean, eps in sums(bare(inverse.args[0])):
            if isinstance(eps, float) and (squared := _mean_square(bare(mean))) is not None:
                if unwidened(squared) is unwidened(x):
                    return Norm(x, "rms", eps)
    return None


def _mean_square(node):
    """x of mean(x², -1, keepdim=True), or None."""
    if packet(node) is not aten.mean or not is_tensor(node.args[0]) or len(node.args) < 3:
        return None
    square, dims, keepdim = node.args[:3]
    if not keepdim or list(dims) not in ([-1], [val(square).ndim - 1]):
        return None
    square = bare(square)
    if packet(square) is aten.square:
        return square.args[0]
    if packet(square) is aten.pow and square.args[1] == 2:
        return square.args[0]
    pair = operands(square, aten.mul)
    return pair[0] if pair and pair[0] is pair[1] else None


def _scaled(n: Norm, factor) -> Norm | None:
    if n.shift is not None:
        return None
    width = val(n.x).shape[-1]
    if n.weight is n.bias is n.scale is None and is_vector(factor, width):
        return replace(n, weight=factor)
    scale = is_one_plus(factor)
    if scale is not None and n.scale is None and broadcasts(scale, n.x):
        return replace(n, scale=scale)
    return None


def _shifted(n: Norm, term) -> Norm | None:
    if n.shift is not None or not is_tensor(term):
        return None
    if n.bias is n.scale is None and is_vector(term, val(n.x).shape[-1]):
        return replace(n, bias=term)
    return replace(n, shift=term) if broadcasts(term, n.x) else None


def roots(graph: Graph) -> list[tuple[Node, Norm]]:
    """The norms that no larger one contains, first ones first."""
    norms = {node: n for node in graph.nodes if (n := norm_of(node))}

    def is_within(node, user) -> bool:
        return user in norms and unwidened(user) is user and norms[user].x is norms[node].x

    return [
        (node, n)
        for node, n in norms.items()
        if unwidened(node) is node and not all(is_within(node, user) for user in node.users)
    ]


def vector(graph: Graph, node: Node | None) -> Node | None:
    """One number for each channel as (D,)."""
    if node is None or val(node).ndim == 1:
        return node
    return call(graph, aten.flatten.using_ints, node)


def emit(graph: Graph, node: Node, n: Norm) -> Node | None:
    """The call of `norm_modulate` that a node stands for."""
    x = in_dtype(graph, n.x, val(node).dtype)
    rank = val(x).ndim
    rows = x
    if rank == 2:
        rows = call(graph, aten.unsqueeze.default, x, 0)
    elif rank > 3:
        if n.scale is not None or n.shift is not None:
            return None
        rows = call(graph, aten.flatten.using_ints, x, 1, rank - 2)
    modulation = [None if m is None else as_rows(graph, m, rows) for m in (n.scale, n.shift)]
    parameters = vector(graph, n.weight), vector(graph, n.bias)
    out = call(graph, norm_modulate, rows, *parameters, *modulation, n.eps, n.kind)
    return out if rank == 3 else call(graph, aten.view_as.default, out, x)
