"""What acts on each token by itself: norms with their modulation, gated residuals, activations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from lumina_kernels import (
    gate_residual_norm,
    gelu,
    norm_modulate,
    sandwich_norm,
    sandwich_norm_chain,
    swiglu,
)
from lumina_kernels.dropin.graph import (
    Calls,
    Match,
    as_rows,
    aten,
    bare,
    broadcasts,
    fused_sums,
    in_dtype,
    is_cast,
    is_like,
    is_tensor,
    is_vector,
    item,
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
        return self.kind == "rms" and self.bias is self.scale is self.shift is None


def norm_of(node) -> Norm | None:
    """What norm a node is, if it is one."""
    if not is_tensor(node):
        return None
    if is_cast(node):
        return norm_of(node.args[0])
    if packet(node) in (aten.layer_norm, aten.rms_norm):
        return _whole_norm(node)
    found = [_written_out(x, root) for x, root in products(node)]
    found += [_scaled(norm_of(n), factor) for n, factor in products(node)]
    found += [_shifted(norm_of(n), term) for n, term in sums(node)]
    if packet(node) is aten.addcmul:
        found += [_shifted(_scaled(norm_of(x), y), term) for term, x, y in fused_sums(node)]
    return next(filter(None, found), None)


def _whole_norm(node: Node) -> Norm | None:
    is_layer = packet(node) is aten.layer_norm
    x, shape, weight, bias, eps = (*node.args, *(None,) * 3)[:5]
    if not is_layer:
        bias, eps = None, bias
    if eps is None:
        acc = torch.promote_types(val(x).dtype, torch.float32)
        eps = 1e-5 if is_layer else torch.finfo(acc).eps
    return Norm(x, "layer" if is_layer else "rms", eps, weight, bias) if len(shape) == 1 else None


def _written_out(x, inverse) -> Norm | None:
    """x * rsqrt(mean(x²) + eps)"""
    inverse = bare(inverse)
    if packet(inverse) is aten.rsqrt:
        for mean, eps in sums(bare(inverse.args[0])):
            squared = _squared(bare(mean))
            if isinstance(eps, float) and squared is not None:
                return Norm(x, "rms", eps) if unwidened(squared) is unwidened(x) else None
    return None


def _squared(mean):
    """x of mean(x², -1, keepdim=True), or None."""
    if packet(mean) is not aten.mean or len(mean.args) < 3 or not mean.args[2]:
        return None
    square, dims = bare(mean.args[0]), list(mean.args[1])
    is_power = packet(square) is aten.pow and square.args[1] == 2
    factors = next(products(square), (None, square))
    if dims not in ([-1], [val(square).ndim - 1]):
        return None
    if packet(square) is aten.square or is_power or factors[0] is factors[1]:
        return square.args[0]
    return None


def _scaled(n: Norm | None, factor) -> Norm | None:
    if n is None or n.shift is not None or not is_tensor(factor):
        return None
    if n.weight is n.bias is n.scale is None and is_vector(factor, val(n.x).shape[-1]):
        return replace(n, weight=factor)
    for one, scale in sums(bare(factor)):
        if one == 1 and n.scale is None and broadcasts(scale, n.x):
            return replace(n, scale=scale)
    return None


def _shifted(n: Norm | None, term) -> Norm | None:
    if n is None or n.shift is not None or not is_tensor(term):
        return None
    if n.bias is n.scale is None and is_vector(term, val(n.x).shape[-1]):
        return replace(n, bias=term)
    return replace(n, shift=term) if broadcasts(term, n.x) else None


def _is_root(node: Node, n: Norm) -> bool:
    """Whether a norm is all of it: it is used otherwise than in a larger one, of the same x."""

    def is_within(user) -> bool:
        if unwidened(user) is not user:
            return all(map(is_within, user.users))
        larger = norm_of(user)
        return larger is not None and larger.x is n.x

    return unwidened(node) is node and not all(map(is_within, node.users))


def norms(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        if (n := norm_of(node)) and _is_root(node, n):
            yield Match("norm", [node], lambda call, node=node, n=n: [_emit_norm(call, node, n)])


def _emit_norm(call: Calls, node: Node, n: Norm) -> Node:
    x = in_dtype(call, n.x, val(node).dtype)
    while val(x).ndim < 3:
        x = call(aten.unsqueeze.default, x, 0)
    rows = x if val(x).ndim == 3 else call(aten.flatten.using_ints, x, 1, val(x).ndim - 2)
    modulation = [as_rows(call, m, x) for m in (n.scale, n.shift)]
    parameters = _vector(call, n.weight), _vector(call, n.bias)
    out = call(norm_modulate, rows, *parameters, *modulation, n.eps, n.kind)
    return out if is_like(node, out) else call(aten.view_as.default, out, n.x)


def _vector(call: Calls, node: Node | None) -> Node | None:
    """One number for each channel as (D,)."""
    if node is None or val(node).ndim == 1:
        return node
    return call(aten.flatten.using_ints, node)


@dataclass(frozen=True)
class Residual:
    """residual + gate * y; `norm` is that of y, if y is an RMSNorm, and then `tanh` says whether
    the gate's is taken."""

    residual: Node
    y: Node
    gate: Node | None
    norm: Norm | None = None
    tanh: bool = False


def residual_of(node) -> Residual | None:
    """What gated or normed residual a node is, if it is one."""
    if not is_tensor(node) or val(node).ndim != 3:
        return None
    for residual, y, gate in fused_sums(node):
        if is_like(residual, node) and is_like(y, node) and _is_gate(gate, y):
            if (norm := norm_of(y)) and norm.is_plain_rms:
                tanh = packet(bare(gate)) is aten.tanh
                return Residual(residual, y, bare(gate).args[0] if tanh else gate, norm, tanh)
            return Residual(residual, y, gate)
    for residual, y in sums(node):
        if is_like(residual, node) and is_like(y, node) and (norm := norm_of(y)):
            if norm.is_plain_rms:
                return Residual(residual, y, None, norm)
    return None


def plain_residual_of(node) -> Residual | None:
    for residual, y in sums(node):
        if is_like(residual, node) and is_like(y, node) and val(node).ndim == 3:
            return Residual(residual, y, None)
    return None


def _is_gate(gate, y: Node) -> bool:
    return broadcasts(gate, y) and val(gate).ndim > 1


def residuals(graph: Graph) -> Iterator[Match]:
    after = {}
    for node in list(graph.nodes):
        if (n := norm_of(node)) and _is_root(node, n) and val(node).ndim == 3:
            after.setdefault(unwidened(n.x), node)
    for node in list(graph.nodes):
        r, root = residual_of(node), after.get(node)
        n = norm_of(root)
        if n and (both := r or plain_residual_of(node)):
            if both.norm is None or (n.kind == "rms" and n.eps == both.norm.eps):
                yield Match(
                    "residual and norm", [node, root],
                    lambda call, a=(node, both, n): _emit_residual_and_norm(call, *a),
                )  # fmt: skip
        if r and node.users:  # still there
            yield Match(
                "residual", [node], lambda call, node=node, r=r: _emit_residual(call, node, r)
            )


def _emit_residual(call: Calls, node: Node, r: Residual) -> list[Node] | None:
    residual = in_dtype(call, r.residual, val(node).dtype)
    if r.norm is None:
        if not val(r.y).dtype == val(r.gate).dtype == val(node).dtype:
            return None
        return [call(aten.addcmul.default, residual, r.gate, r.y)]
    weight, gate = _vector(call, r.norm.weight), as_rows(call, r.gate, residual)
    return [call(sandwich_norm, r.norm.x, residual, weight, gate, r.norm.eps, r.tanh)]


def _emit_residual_and_norm(call: Calls, node: Node, r: Residual, n: Norm) -> list[Node]:
    residual = in_dtype(call, r.residual, val(node).dtype)
    gate, scale, shift = (as_rows(call, m, residual) for m in (r.gate, n.scale, n.shift))
    weight, bias = _vector(call, n.weight), _vector(call, n.bias)
    if r.norm is None:
        last = weight, bias, scale, shift, n.eps, n.kind
        pair = call(gate_residual_norm, r.y, residual, gate, *last)
    elif bias is shift is None:
        own = _vector(call, r.norm.weight)
        rest = own, gate, weight, scale, n.eps, r.tanh
        pair = call(sandwich_norm_chain, r.norm.x, residual, *rest)
    else:
        return None
    return [call(item, pair, i) for i in range(2)]


def activations(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        if packet(node) is aten.gelu:
            arguments = node.args[0], node.kwargs.get("approximate", "none")
            yield Match("gelu", [node], lambda call, a=arguments: [call(gelu, *a)])
        for activated, b in products(node):
            silu = bare(activated)
            if packet(silu) is aten.silu and is_like(b, silu):
                pair = bare(silu.args[0]), b
                if val(pair[0]).dtype == val(b).dtype:
                    yield Match("glu", [node], lambda call, a=pair: [call(swiglu, *a)])
                    break
