"""Gated residuals, with the norm before them (`sandwich_norm`), after them, or both."""

from dataclasses import dataclass

from torch.fx import Graph, Node

from lumina_kernels import gate_residual_norm, sandwich_norm, sandwich_norm_chain
from lumina_kernels.dropin.graph import (
    as_rows,
    aten,
    bare,
    broadcasts,
    call,
    in_dtype,
    is_tensor,
    packet,
    products,
    sums,
    val,
)
from lumina_kernels.dropin.norms import Norm, norm_of, vector


@dataclass(frozen=True)
class Residual:
    """residual + gate * y; `norm` is that of y, if y is an RMSNorm, and `tanh` says how the gate
    is meant."""

    residual: Node
    y: Node
    gate: Node | None
    tanh: bool
    norm: Norm | None


def residual_of(node) -> Residual | None:
    """What gated residual a node is, if it is one."""
    if not is_tensor(node) or val(node).ndim != 3:
        return None
    candidates = list(sums(node))
    if packet(node) is aten.addcmul and not node.kwargs:
        residual, *pair = node.args
        for y, gate in (pair, pair[::-1]):
            if _is_gate(gate, y) and _is_like(residual, node) and _is_like(y, node):
                return _sandwiched(residual, y, gate)
        return None
    for residual, term in candidates:
        if not (_is_like(residual, node) and _is_like(term, node)):
            continue
        for y, gate in products(bare(term)):
            if is_tensor(y) and _is_gate(gate, y) and _is_like(y, node):
                return _sandwiched(residual, y, gate)
    for residual, term in candidates:
        if _is_like(residual, node) and _is_like(term, node):
            norm = norm_of(term)
            if norm is not None and norm.is_plain_rms and norm.scale is None:
                return Residual(residual, term, None, False, norm)
    return None


def _is_like(node, other: Node) -> bool:
    return is_tensor(node) and str(val(node).shape) == str(val(other).shape)


def _is_gate(gate, y) -> bool:
    """One row for a sample, or rows that are not shaped by tokens alone."""
    return is_tensor(y) and broadcasts(gate, y) and val(gate).ndim > 1


def _sandwiched(residual: Node, y: Node, gate: Node) -> Residual:
    inner = bare(gate)
    tanh = packet(inner) is aten.tanh
    norm = norm_of(y)
    if norm is not None and norm.is_plain_rms and norm.scale is None:
        return Residual(residual, y, inner.args[0] if tanh else gate, tanh, norm)
    return Residual(residual, y, gate, False, None)


def emit_alone(graph: Graph, node: Node, r: Residual) -> Node | None:
    residual = in_dtype(graph, r.residual, val(node).dtype)
    if r.norm is None:
        if val(r.y).dtype != val(node).dtype or val(r.gate).dtype != val(node).dtype:
            return None
        return call(graph, aten.addcmul.default, residual, r.gate, r.y)
    gate = None if r.gate is None else as_rows(graph, r.gate, residual)
    weight = vector(graph, r.norm.weight)
    y = in_dtype(graph, r.norm.x, val(r.norm.x).dtype)
    return call(graph, sandwich_norm, y, residual, weight, gate, r.norm.eps, r.tanh)


def emit_with_norm(graph: Graph, node: Node, r: Residual, n: Norm) -> tuple[Node, Node] | None:
    """new_residual and its norm, both in the dtype of `node`."""
    residual = in_dtype(graph, r.residual, val(node).dtype)
    gate = None if r.gate is None else as_rows(graph, r.gate, residual)
    scale, shift = (None if m is None else as_rows(graph, m, residual) for m in (n.scale, n.shift))
    weight, bias = vector(graph, n.weight), vector(graph, n.bias)
    if r.norm is None:
        pair = call(
            graph,
            gate_residual_norm,
            r.y,
            residual,
            gate,
            weight,
            bias,
            scale,
            shift,
            n.eps,
            n.kind,
        )
    elif n.is_plain_rms and n.eps == r.norm.eps:
        own = vector(graph, r.norm.weight)
        pair = call(
            graph, sandwich_norm_chain, r.norm.x, residual, own, gate, weight, scale, n.eps, r.tanh
        )
    else:
        return None
    return tuple(call(graph, _item, pair, i) for i in range(2))


def _item(pair, i: int):
    return pair[i]
