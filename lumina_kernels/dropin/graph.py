"""What the patterns share: kinds of nodes, what to look through, and what a part computes."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch._guards import detect_fake_mode, tracing
from torch.fx import Graph, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
RANDOM = torch.Tag.nondeterministic_seeded

CASTS = {aten.to, aten._to_copy, aten.type_as}
COPIES = {aten.contiguous, aten.clone, aten.alias}  # not detach, which ends a gradient
VIEWS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze,
    aten.squeeze, aten.transpose, aten.permute, aten.expand, aten.unbind, aten.chunk, aten.split,
    aten.split_with_sizes, aten.select, aten.slice, aten.expand_as, aten.view_as, aten.movedim,
    aten.swapaxes, aten.swapdims, aten.narrow, aten.unsafe_chunk, aten.unsafe_split, aten.mT,
    aten.view_as_complex, aten.view_as_real, aten.real, operator.getitem, *CASTS, *COPIES,
}  # fmt: skip
MOVES = {  # exact in every dtype, as are views
    *VIEWS, aten.imag, aten.neg, aten.stack, aten.cat, aten.concat, aten.complex, aten.roll,
    aten.slice_scatter, aten.sym_size, aten.empty_like, aten.zeros_like,
}  # fmt: skip
TOKENS = 13  # enough to tell one rotation from another


def insert(before: Node, function: Callable, *args) -> tuple:
    """Put what a function of tensors calls before a node, as nodes. Of an op of this package these
    are its kernels: it checks its arguments now, and never again. Returns the results and all."""
    sources = {}
    map_arg(args, lambda node: sources.setdefault(node, val(node)))

    def run(*values):
        return function(*map_arg(args, dict(zip(sources, values, strict=True)).get))

    values = list(sources.values())
    with tracing(None), detect_fake_mode(values):  # not the mode that Dynamo has for backends
        traced = make_fx(run)(*values)
    traced.graph.eliminate_dead_code()
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True))
    with before.graph.inserting_before(before):
        results = before.graph.graph_copy(traced.graph, copies)
    return results, [node for node in copies.values() if node not in sources]


class _Renewing(Interpreter):
    def run_node(self, node: Node):
        node.meta["val"] = result = super().run_node(node)
        return result


def renew(graph: Graph) -> None:
    """Give the nodes of a graph their fake results again, after it was changed."""
    inputs = list(map(val, graph.find_nodes(op="placeholder")))
    with tracing(None), detect_fake_mode(inputs):
        _Renewing(graph.owning_module).run(*inputs)


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def live(graph: Graph) -> Iterator[Node]:
    """The model's calls that are used, also while matches are replaced; larger ones end later."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.users and "by" not in node.meta:
            yield node


def packet(node) -> object:
    """The ATen op that a node calls, whatever its overload; None for anything else."""
    is_call = isinstance(node, Node) and node.op == "call_function"
    return getattr(node.target, "overloadpacket", node.target) if is_call else None


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


def holds(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether a dtype has the numbers of another one."""
    return torch.promote_types(a, b) == a


def narrows(node) -> bool:
    return is_cast(node) and not holds(val(node).dtype, val(node.args[0]).dtype)


def is_swap(node) -> bool:
    """Whether a node exchanges the dimensions 1 and 2 of 4."""
    if packet(node) not in (aten.transpose, aten.permute) or val(node).ndim != 4:
        return False
    return same(layout(val(node)), layout(val(node.args[0]).transpose(1, 2)))


def bare(node):
    """The node behind casts and copies."""
    while is_cast(node) or packet(node) in COPIES:
        node = node.args[0]
    return node


def unwidened(node):
    """The node behind casts that lost nothing, and copies."""
    while packet(node) in COPIES or is_cast(node) and not narrows(node):
        node = node.args[0]
    return node


def behind(node: Node, dtype: torch.dtype) -> Node:
    """The node of a dtype behind casts that lost nothing, or the last one."""
    while val(node).dtype != dtype and unwidened(node) is not node:
        node = node.args[0]
    return node


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(torch.promote_types(x.dtype, dtype))


def operands(node, op) -> Iterator[tuple]:
    """The operands of a commutative binary op, in both orders."""
    if packet(node) is op and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1:
        yield node.args
        yield node.args[::-1]


def layout(x: Tensor) -> tuple:
    return *x.shape, *x.stride(), x.dtype, x.device


def same(a, b) -> bool:
    """Whether sizes or shapes, maybe symbolic, are known to be equal."""
    a, b = (tuple(x) if isinstance(x, (tuple, list)) else x for x in (a, b))
    return str(a) == str(b)


def is_like(node, other: Node) -> bool:
    return is_tensor(node) and same(val(node).shape, val(other).shape)


def evaluate(root: Node, leaves: Iterable[Node], tokens: int) -> dict[Node, Tensor] | None:
    """Random values of the leaves, of which `root` is computed, and its value for these. None if it
    is computed of others, too. TOKENS tokens stand for many, where that can be computed."""
    for many, step in ((tokens, 1), (None, 8)):
        try:
            return _values(root, leaves, many, step)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
            continue  # a size that is another than the number of tokens, or made of it
    return None


def _values(root: Node, leaves: Iterable[Node], many, step: int) -> dict[Node, Tensor]:
    values, known = {}, {}
    fixed = {n for leaf in filter(is_tensor, leaves) for n in val(leaf).shape if type(n) is int}
    primes = (n for n in itertools.count(TOKENS) if all(n % p for p in range(2, n)))
    others = (n * step for n in primes if n * step not in fixed)

    def size(n):
        if isinstance(n, torch.SymInt):  # any number, but none that another size has by chance
            for symbol in sorted(n.node.expr.free_symbols, key=str):
                known[symbol] = known.get(symbol) or next(others)
            return int(n.node.expr.xreplace(known))
        if isinstance(n, (torch.SymFloat, torch.SymBool)):
            raise TypeError("a number that is not known")
        return TOKENS if type(n) is int is type(many) and TOKENS < n == many else n

    def of(node):
        if not isinstance(node, Node):
            return size(node)
        if node not in values:
            if not isinstance(node.meta["val"], (Tensor, tuple, list)):
                values[node] = size(node.meta["val"])
            elif is_cast(node):
                values[node] = of(node.args[0])
            elif packet(node) is aten.detach or RANDOM in getattr(node.target, "tags", ()):
                raise ValueError("more than a value")
            else:
                args, kwargs = map_aggregate((node.args, node.kwargs), of)
                wide = [n for n, x in kwargs.items() if getattr(x, "is_floating_point", 0) is True]
                kwargs = {name: x for name, x in kwargs.items() if name not in wide}
                values[node] = node.target(*args, **kwargs)
        return values[node]

    own = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}  # not the user's
    for node in filter(is_tensor, leaves):
        *rows, channels = val(node).shape or (1,)
        channels = channels if type(channels) is int else size(channels)
        dtype, shape = torch.float64, [*map(size, rows), channels]
        scale = 10 ** (-4 * torch.rand((*shape[:-1], 1), dtype=dtype, **own))  # where bounds act
        dtype = torch.complex128 if val(node).is_complex() else dtype
        values[node] = torch.randn(shape, dtype=dtype, **own) * scale
    of(root)
    return values
