"""What the patterns share: kinds of nodes, and how to look through those that change no number."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten

CASTS = {aten.to, aten._to_copy, aten.type_as}
COPIES = {aten.contiguous, aten.clone, aten.detach, aten.alias}


@dataclass(frozen=True)
class Calls:
    """Makes new nodes at the insertion point of a graph, with their fake results."""

    graph: Graph
    backend: str | None = None

    def __call__(self, target: Callable, *args, **kwargs) -> Node:
        if is_op(target):
            kwargs["backend"] = self.backend
        node = self.graph.call_function(target, args, kwargs)
        args, kwargs = torch.fx.node.map_arg((args, kwargs), val)
        node.meta["val"] = target(*args, **kwargs)
        return node


def is_op(target) -> bool:
    return getattr(target, "__module__", "").startswith("lumina_kernels.ops.")


@dataclass(frozen=True)
class Match:
    """Nodes that an op can take the place of."""

    kind: str  # what is there: "norm", "rotation", "attention", "residual", "glu", "gelu"
    roots: list[Node]
    emit: Callable[[Calls], list[Node] | None]  # what takes their place; None if nothing does


def packet(node) -> object:
    """The ATen op that a node calls, whatever its overload; None for anything else."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    return getattr(node.target, "overloadpacket", node.target)


def val(node: Node) -> Tensor:
    return node.meta["val"]


def is_tensor(node) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def is_cast(node) -> bool:
    """Whether a node changes nothing but the dtype."""
    return packet(node) in CASTS and is_tensor(node.args[0])


def is_swap(node) -> bool:
    """Whether a node exchanges the dimensions 1 and 2 of 4."""
    if not is_tensor(node) or val(node).ndim != 4:
        return False
    if packet(node) is aten.transpose:
        return {d % 4 for d in node.args[1:3]} == {1, 2}
    return packet(node) is aten.permute and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]


def bare(node):
    """The node behind casts and copies."""
    while is_cast(node) or packet(node) in COPIES:
        node = node.args[0]
    return node


def unwidened(node):
    """The node behind casts that lost nothing, and copies."""
    while packet(node) in COPIES or (is_cast(node) and _is_wider(node, node.args[0])):
        node = node.args[0]
    return node


def _is_wider(node: Node, source: Node) -> bool:
    wide, narrow = val(node).dtype, val(source).dtype
    return torch.promote_types(wide, narrow) == wide


def in_dtype(call: Calls, node: Node, dtype: torch.dtype) -> Node:
    """The node in a dtype: a node behind its casts that has it, or a new cast."""
    while val(node).dtype != dtype and unwidened(node) is not node:
        node = node.args[0]
    return node if val(node).dtype == dtype else call(aten.to.dtype, node, dtype)


def item(pair, i: int):
    return pair[i]


def operands(node, *ops) -> Iterator[tuple]:
    """The operands of a commutative binary op, in both orders."""
    if packet(node) in ops and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1:
        yield node.args
        yield node.args[::-1]


def products(node) -> Iterator[tuple]:
    return operands(node, aten.mul, aten.mul_)


def sums(node) -> Iterator[tuple]:
    return operands(node, aten.add, aten.add_)


def fused_sums(node) -> Iterator[tuple]:
    """a, x, y of a + x * y, which may be one node, x and y in both orders."""
    if packet(node) is aten.addcmul and not node.kwargs:
        a, x, y = node.args
        yield from ((a, x, y), (a, y, x))
    for a, product in sums(node):
        for x, y in products(bare(product)):
            yield a, x, y


def same(a, b) -> bool:
    """Whether sizes or shapes, maybe symbolic, are known to be equal."""
    a, b = (tuple(x) if isinstance(x, (tuple, list)) else x for x in (a, b))
    return str(a) == str(b)


def is_like(node, other: Node) -> bool:
    return is_tensor(node) and same(val(node).shape, val(other).shape)


def is_vector(node, width: int) -> bool:
    """Whether a node is one number for each channel."""
    return is_tensor(node) and val(node).numel() == width == val(node).shape[-1]


def broadcasts(node, like: Node) -> bool:
    """Whether a node has the channels of `like`, (B, L, D), and rows for all, samples or tokens."""
    if not is_tensor(node) or not val(node).is_floating_point() or val(node).ndim == 0:
        return False
    shape, full = val(node).shape, val(like).shape
    pairs = zip(reversed(shape[:-1]), reversed(full[:-1]), strict=False)
    fits = len(shape) <= len(full) and same(shape[-1], full[-1])
    return fits and all(same(a, b) or same(a, 1) for a, b in pairs)


def as_rows(call: Calls, node: Node | None, like: Node) -> Node | None:
    """What broadcasts to (B, L, D) as (B, D) or (B, L, D), without a copy."""
    if node is None:
        return None
    while val(node).ndim < 3:
        node = call(aten.unsqueeze.default, node, 0)
    rows, full = val(node).shape, val(like).shape
    if not same(rows[0], full[0]):
        node = call(aten.expand.default, node, [size_of(call, like, 0), -1, -1])
    return call(aten.select.int, node, 1, 0) if same(rows[1], 1) else node


def size_of(call: Calls, node: Node, dim: int):
    size = val(node).shape[dim]
    return size if isinstance(size, int) else call(aten.sym_size.int, node, dim)
