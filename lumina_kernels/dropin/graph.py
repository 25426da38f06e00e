"""What the patterns share: kinds of nodes, and how to look through those that change no number."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten

CASTS = (aten.to, aten._to_copy, aten.type_as)
COPIES = (aten.contiguous, aten.clone, aten.detach, aten.alias)


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


def mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


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


def in_dtype(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    """The node in a dtype: a node behind its casts that has it, or a new cast."""
    while val(node).dtype != dtype and unwidened(node) is not node:
        node = node.args[0]
    return node if val(node).dtype == dtype else call(graph, aten.to.dtype, node, dtype)


def call(graph: Graph, target, *args, **kwargs) -> Node:
    """A new node at the insertion point, with its fake result."""
    node = graph.call_function(target, args, kwargs)
    fakes = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*fakes[0], **fakes[1])
    return node


def operands(node, op) -> tuple | None:
    """Both operands of a binary op without further options."""
    if packet(node) is not op or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    return node.args


def either_way(pair: tuple | None) -> Iterator[tuple]:
    """Both orders of the operands of a commutative op; none for None."""
    if pair is not None:
        yield pair
        yield pair[::-1]


def products(node) -> Iterator[tuple]:
    yield from either_way(operands(node, aten.mul))


def sums(node) -> Iterator[tuple]:
    """Operands of sums, in both orders; `addcmul` is a sum of which one has no node: see `fma`."""
    yield from either_way(operands(node, aten.add))


def is_one_plus(node):
    """s of 1 + s, or None."""
    for one, s in sums(bare(node)):
        if one == 1 and is_tensor(s):
            return s
    return None


def is_vector(node, width) -> bool:
    """Whether a node is one number for each channel."""
    return is_tensor(node) and node_numel(node) == width and val(node).shape[-1] == width


def node_numel(node: Node):
    return val(node).numel()


def broadcasts(node, like: Node) -> bool:
    """Whether a node has the channels of (B, L, D) `like`, and rows for all, a sample or a token."""
    if not is_tensor(node) or not val(node).is_floating_point():
        return False
    shape, full = val(node).shape, val(like).shape
    if not 1 <= len(shape) <= len(full) or shape[-1] != full[-1]:
        return False
    pairs = zip(reversed(shape), reversed(full), strict=False)
    return all(_same(a, b) or _same(a, 1) for a, b in pairs)


def _same(a, b) -> bool:
    """Whether two sizes, maybe symbolic, are known to be equal."""
    return isinstance(a == b, bool) and a == b or str(a) == str(b)


def as_rows(graph: Graph, node: Node, like: Node) -> Node:
    """What broadcasts to (B, L, D) as (B, D) or (B, L, D), without a copy."""
    rank = val(node).ndim
    while rank < 3:
        node, rank = call(graph, aten.unsqueeze.default, node, 0), rank + 1
    rows, full = val(node).shape, val(like).shape
    if not _same(rows[0], full[0]):
        node = call(graph, aten.expand.default, node, [size_of(graph, like, 0), -1, -1])
    return call(graph, aten.select.int, node, 1, 0) if _same(rows[1], 1) else node


def size_of(graph: Graph, node: Node, dim: int):
    size = val(node).shape[dim]
    return size if isinstance(size, int) else call(graph, aten.sym_size.int, node, dim)
