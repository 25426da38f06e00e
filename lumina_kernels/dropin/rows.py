"""What acts on each token by itself: norms with their modulation, gated residuals, activations."""

from collections import namedtuple
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

import lumina_kernels as ops

from . import graph as g
from .graph import aten, evaluate, packet, val

# (norm(x) * weight + bias) * (1 + scale) + shift, each term a node or None.
Norm = namedtuple("Norm", "x kind eps weight bias scale shift", defaults=(None,) * 4)

# residual + gate * y; `norm` is that of y, if it is an RMSNorm, and then `tanh` that of the gate.
Residual = namedtuple("Residual", "residual y gate norm tanh", defaults=(None, False))


def norm_of(node, depth: int = 5) -> Norm | None:
    """What norm a node is, if it is one; `depth` is how many terms and factors it may have."""
    if not g.is_tensor(node) or depth < 0 or "by" in node.meta:
        return None
    if g.is_cast(node):
        return norm_of(node.args[0], depth)
    if packet(node) in (aten.layer_norm, aten.rms_norm):
        return _whole_norm(node)
    found, less = [_written_out(node)], depth - 1
    found += [_scaled(norm_of(n, less), factor) for n, factor in g.operands(node, aten.mul)]
    found += [_shifted(norm_of(n, less), term) for n, term in g.operands(node, aten.add)]
    if packet(node) is aten.addcmul and not node.kwargs:
        ways = node.args[1:], node.args[:0:-1]
        found += [_shifted(_scaled(norm_of(n, less), m), node.args[0]) for n, m in ways]
    return next(filter(None, found), None)


def _whole_norm(node: Node) -> Norm | None:
    x, shape, weight, *more = (*node.args, *(None,) * 3)
    smallest = torch.finfo(torch.promote_types(val(x).dtype, torch.float32)).eps
    kind, bias = ("layer", more.pop(0)) if packet(node) is aten.layer_norm else ("rms", None)
    eps = more[0] if more[0] is not None else 1e-5 if kind == "layer" else smallest
    return Norm(x, kind, eps, weight, bias) if len(shape) == 1 else None


def _written_out(node: Node) -> Norm | None:
    """x * rsqrt(mean(x²) + eps), in whatever way."""
    is_product = packet(node) in (aten.mul, aten.div) and all(map(g.is_tensor, node.args[:2]))
    for x, inverse in (node.args, node.args[::-1]) if is_product else ():
        if g.is_like(x, node) and g.same(val(inverse).shape, (*val(x).shape[:-1], 1)):
            x = g.unwidened(x)
            if "eps" not in node.meta:  # of this node it stays what it is
                node.meta["eps"] = _eps(node, x)
            return Norm(x, "rms", node.meta["eps"]) if node.meta["eps"] else None
    return None


def _eps(node: Node, x: Node) -> float | None:
    if (values := evaluate(node, [x], val(x).shape[1])) is None:
        return None
    mean = values[x].square().mean(-1, keepdim=True)
    eps = ((values[x] / values[node]).square() - mean).median().item()
    want = values[x] * torch.rsqrt(mean + eps)
    is_norm = 1e-13 < eps < 0.1 and torch.allclose(values[node], want, rtol=1e-9)
    return float(f"{eps:.7g}") if is_norm else None


def _scaled(n: Norm | None, factor) -> Norm | None:
    if n is None or n.shift is not None or not g.is_tensor(factor):
        return None
    for one, scale in g.operands(g.bare(factor), aten.add):
        if one == 1 and n.scale is None and _broadcasts(scale, n.x) and val(scale).ndim > 1:
            return n._replace(scale=scale)
    if n.weight is n.bias is n.scale is None and _is_vector(factor, n):
        return n._replace(weight=factor)
    is_row = _broadcasts(factor, n.x) and val(factor).shape[-2:-1] == (1,) and val(n.x).ndim == 3
    return n._replace(scale=(factor,)) if is_row and n.scale is None else None


def _shifted(n: Norm | None, term) -> Norm | None:
    if n is None or n.shift is not None or not g.is_tensor(term):
        return None
    if n.bias is n.scale is None and _is_vector(term, n):
        return n._replace(bias=term)
    return n._replace(shift=term) if _broadcasts(term, n.x) else None


def _is_vector(node: Node, n: Norm) -> bool:
    """Whether a node is one number for each channel."""
    return val(node).numel() == val(n.x).shape[-1] == val(node).shape[-1]


def _broadcasts(node, like: Node) -> bool:
    """Whether a node has the channels of `like`, (B, L, D), and rows for all, samples or tokens."""
    if not g.is_tensor(node) or not val(node).is_floating_point() or val(node).ndim == 0:
        return False
    shape, full = val(node).shape[::-1], val(like).shape[::-1]
    fits = len(shape) <= len(full) and g.same(shape[0], full[0])
    return fits and all(g.same(a, b) or g.same(a, 1) for a, b in zip(shape, full, strict=False))


def norms(graph: Graph) -> Iterator[tuple]:
    for node in reversed(list(g.live(graph))):  # the largest first
        if node.users and g.unwidened(node) is node and (n := norm_of(node)):
            n = n._replace(x=g.behind(n.x, val(node).dtype))
            yield "norm", [node], _emit_norm, val(node).dtype, n


def _emit_norm(call: Callable, dtype: torch.dtype, n: Norm) -> Tensor:
    x = g.widened(n.x, dtype)
    rows = x.flatten(1, -2) if x.ndim > 2 else x[(None,) * (3 - x.ndim)]
    terms = [*map(flat, (n.weight, n.bias)), *(_modulation(m, x) for m in (n.scale, n.shift))]
    return call(ops.norm_modulate, rows, *terms, n.eps, n.kind).view_as(n.x)


def flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten()


def _modulation(x: Tensor | tuple | None, like: Tensor) -> Tensor | None:
    """What broadcasts to (B, L, D) as (B, 1, D) or (B, L, D), without a copy."""
    if x is None:
        return None
    if like.ndim != 3:
        raise NotImplementedError("a modulation of what is not (B, L, D)")
    x = x[0] - 1 if isinstance(x, tuple) else x  # the whole factor
    return x[(None,) * (3 - x.ndim)].expand(like.shape[0], -1, -1)


def residual_of(node: Node) -> Residual | None:
    """What residual a node is, if it is one; the best that can be said of it."""
    ways, found = [], None
    if packet(node) is aten.addcmul and not node.kwargs:
        ways = [node.args, (node.args[0], *node.args[:0:-1])]
    for a, b in g.operands(node, aten.add):
        ways += [(a, *pair) for pair in g.operands(g.bare(b), aten.mul)] + [(a, b, None)]
    ways.sort(key=lambda way: way[2] is None)
    for residual, y, gate in ways if val(node).ndim == 3 else ():
        if not g.is_like(residual, node) or not g.is_like(y, node):
            continue
        if gate is None or (_broadcasts(gate, y) and val(gate).ndim > 1):
            norm, tanh = norm_of(y), packet(g.bare(gate)) is aten.tanh
            if norm and norm.kind == "rms" and norm.bias is norm.scale is norm.shift is None:
                return Residual(residual, y, g.bare(gate).args[0] if tanh else gate, norm, tanh)
            found = found or Residual(residual, y, gate)
    return found


def residuals(graph: Graph) -> Iterator[tuple]:
    ends = [(norm_of(x), x) for x in g.live(graph) if g.unwidened(x) is x]  # the largest last
    following = {g.unwidened(n.x): node for n, node in ends if n and val(node).ndim == 3}
    for node in g.live(graph):
        if not g.is_tensor(node) or (r := residual_of(node)) is None:
            continue
        dtype, root = val(node).dtype, following.get(node)
        r = r._replace(residual=g.behind(r.residual, dtype))
        if root and root.users and (n := norm_of(root)):
            yield "residual and norm", [node, root], _emit_residual, dtype, r, n
        if node.users and (r.gate or r.norm):
            yield "residual", [node], _emit_residual, dtype, r


def _emit_residual(call: Callable, dtype: torch.dtype, r: Residual, n: Norm | None = None):
    residual = g.widened(r.residual, dtype)
    if n is r.norm is None:
        if {r.y.dtype, r.gate.dtype} != {dtype}:
            raise NotImplementedError("dtypes differ")
        return torch.addcmul(residual, r.gate.expand_as(r.y), r.y)
    gate, weight = _modulation(r.gate, residual), r.norm and flat(r.norm.weight)
    if n is None:
        return call(ops.sandwich_norm, r.norm.x, residual, weight, gate, r.norm.eps, r.tanh)
    scale, shift = (_modulation(m, residual) for m in (n.scale, n.shift))
    if r.norm is None:
        last = flat(n.weight), flat(n.bias), scale, shift, n.eps, n.kind
        return call(ops.gate_residual_norm, r.y, residual, gate, *last)
    if n.kind == "rms" and n.eps == r.norm.eps and n.bias is shift is None:
        last = weight, gate, flat(n.weight), scale, n.eps, r.tanh
        return call(ops.sandwich_norm_chain, r.norm.x, residual, *last)
    raise NotImplementedError("norms of different kinds")


def activations(graph: Graph) -> Iterator[tuple]:
    for node in g.live(graph):
        if packet(node) is aten.gelu:
            how = node.kwargs.get("approximate", "none")
            yield "gelu", [node], lambda call, *args: call(*args), ops.gelu, node.args[0], how
        for activated, b in g.operands(node, aten.mul):
            silu = g.bare(activated)
            a = g.bare(silu.args[0]) if packet(silu) is aten.silu and g.is_like(b, silu) else None
            if a and val(a).dtype == val(b).dtype:
                yield "glu", [node], lambda call, *args: call(*args), ops.swiglu, a, b
                break
