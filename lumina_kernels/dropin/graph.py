"""What the patterns share: kinds of nodes, and how to look through those that change no number."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
RANDOM = torch.Tag.nondeterministic_seeded

CASTS = {aten.to, aten._to_copy, aten.type_as}
COPIES = {aten.contiguous, aten.clone, aten.alias}  # not detach, which ends a gradient


@dataclass(frozen=True)
class Calls:
    """Makes new nodes at the insertion point of a graph, with their fake results."""

    graph: Graph
    backend: str | None = None
    made: list[Node] = field(default_factory=list)

    def __call__(self, target: Callable, *args, **kwargs) -> Node:
        if getattr(target, "__module__", "").startswith("lumina_kernels.ops."):
            kwargs["backend"] = self.backend
        node = self.graph.call_function(target, args, kwargs)
        args, kwargs = torch.fx.node.map_arg((args, kwargs), val)
        self.made.append(node)
        node.meta["val"] = target(*args, **kwargs)
        return node


def live(graph: Graph) -> Iterator[Node]:
    """The calls that are used, also while matches are replaced; larger patterns end later."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.users:
            yield node


def packet(node) -> object:
    """The ATen op that a node calls, whatever its overload; None for anything else."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    return getattr(node.target, "overloadpacket", node.target)


def val(node: Node) -> Tensor:
    return node.meta["val"]


def is_tensor(node) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def memory(node: Node):
    return val(node).untyped_storage()._cdata if is_tensor(node) else None


def is_cast(node) -> bool:
    """Whether a node only rounds: from one floating dtype to another, where it is."""
    if packet(node) not in CASTS or not is_tensor(node.args[0]):
        return False
    x, y = val(node.args[0]), val(node)
    kinds = {(t.is_floating_point(), t.is_complex(), t.device) for t in (x, y)}
    return len(kinds) == 1 and (x.is_floating_point() or x.is_complex())


def narrows(node) -> bool:
    return is_cast(node) and val(node).itemsize < val(node.args[0]).itemsize


def is_swap(node) -> bool:
    """Whether a node exchanges the dimensions 1 and 2 of 4."""
    if packet(node) not in (aten.transpose, aten.permute) or val(node).ndim != 4:
        return False
    swapped = val(node.args[0]).transpose(1, 2)
    return same((*val(node).shape, *val(node).stride()), (*swapped.shape, *swapped.stride()))


def bare(node):
    """The node behind casts and copies."""
    while is_cast(node) or packet(node) in COPIES:
        node = node.args[0]
    return node


def unwidened(node):
    """The node behind casts that lost nothing, and copies."""
    while packet(node) in COPIES or (
        is_cast(node)
        and torch.promote_types(val(node).dtype, val(node.args[0]).dtype) == val(node).dtype
    ):
        node = node.args[0]
    return node


def in_dtype(call: Calls, node: Node, dtype: torch.dtype) -> Node:
    """The node in a dtype, behind casts that widened it; or in a wider one, if it has no other."""
    while val(node).dtype != dtype and unwidened(node) is not node:
        node = node.args[0]
    is_narrower = torch.promote_types(val(node).dtype, dtype) == dtype != val(node).dtype
    return call(aten.to.dtype, node, dtype) if is_narrower else node


def narrowed(call: Calls, node: Node, like: Node) -> Node:
    """What was computed in a wider dtype in that of another node."""
    wide, dtype = val(node).dtype, val(like).dtype
    is_wider = torch.promote_types(wide, dtype) == wide != dtype
    return call(aten.to.dtype, node, dtype) if is_wider else node


def operands(node, op) -> Iterator[tuple]:
    """The operands of a commutative binary op, in both orders."""
    if packet(node) is op and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1:
        yield node.args
        yield node.args[::-1]


def same(a, b) -> bool:
    """Whether sizes or shapes, maybe symbolic, are known to be equal."""
    a, b = (tuple(x) if isinstance(x, (tuple, list)) else x for x in (a, b))
    return str(a) == str(b)


def is_like(node, other: Node) -> bool:
    return is_tensor(node) and same(val(node).shape, val(other).shape)
