"""From the graph that Dynamo hands to a backend to one of whole ATen ops, without what is idle."""

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch._guards import tracing
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from . import graph as g
from .graph import aten, is_tensor, memory, packet, val

# What Dynamo calls to change the mode of what comes after.
SWITCHES = "_set_grad_enabled", "_enter_autocast", "_exit_autocast"
# Where the functions are that make a gradient another one than that of what is computed.
CUSTOM = re.compile(r"torch\.(_C|_C\._autograd|_C\._functorch|_functorch\..*|autograd\..*|amp\..*)")
OTHERS = "requires_grad_", "register_hook", "retain_grad", "as_strided"
AROUND = "which around whole blocks does no harm"


def capture(gm: GraphModule) -> GraphModule:
    """The same in ATen ops as autograd sees them: linear, layer_norm, attention are still one node
    each. Every node has its fake result in meta["val"], which requires a gradient if it may."""
    inputs = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    if mode is None:
        raise NotImplementedError("no tensor comes in")
    with mode, tracing(None):  # not the fresh one that Dynamo has for backends
        whole = make_fx(_InOneMode(gm).run, pre_dispatch=True)(*inputs)
    for node, x in zip(whole.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = x  # not detached
    g.mark_gradients(whole.graph.nodes)
    return whole


class _InOneMode(Interpreter):
    """Runs a graph as if it changed no mode, and raises if that makes a difference."""

    def run(self, *inputs):
        self.results = {}
        out = super().run(*inputs)
        for node, got in self.results.items():  # with what was written to them
            want = node.meta.get("example_value")
            a, b = ([(x.dtype, x.requires_grad) for x in g.tensors(y)] for y in (want, got))
            if a != b and want is not None:
                raise NotImplementedError(f"{node.name} depends on a mode set inside, {AROUND}")
        return out

    def run_node(self, node):
        name = getattr(node.target, "__name__", str(node.target))
        if name in SWITCHES:
            return None
        is_custom = isinstance(node.target, HigherOrderOperator) and name != "flex_attention"
        is_custom |= bool(CUSTOM.fullmatch(getattr(node.target, "__module__", None) or ""))
        if is_custom or name in OTHERS:
            raise NotImplementedError(f"the pass does not follow {name}, {AROUND}")
        self.results[node] = out = super().run_node(node)
        return out


def clean(graph: Graph) -> None:
    """Drop what computes nothing or a second time, and writes in place that nobody can tell."""
    returned = {memory(n) for n in graph.output_node().all_input_nodes}
    told = {memory(n) for w in graph.nodes if mutates(w) for n in w.all_input_nodes} | returned
    for node in list(graph.nodes):
        if _is_idle(node, told):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.is_impure() or mutates(node))
    _without_writes(graph)
    seen = {}
    for node in list(graph.nodes) if not any(map(mutates, graph.nodes)) else ():
        if is_tensor(node) and g.RANDOM not in getattr(node.target, "tags", ()):
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node and not {memory(first), memory(node)} <= returned:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def mutates(node: Node) -> bool:
    """Whether a node writes to a tensor, or does something else that its place decides about."""
    if packet(node) in (aten.batch_norm, aten.instance_norm):  # no schema says so
        return bool(node.args[5]) and node.args[3] is not None
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema.is_mutable if schema else node.is_impure())


def _is_idle(node: Node, told: set) -> bool:
    """Whether a node returns what it was given, or a copy of it that is not `told` from it."""
    x = node.args[0] if node.args else None
    if not is_tensor(x) or not is_tensor(node):
        return False
    if packet(node) is aten.dropout:
        return not node.args[2] or node.args[1] == 0
    if packet(node) is aten.detach:
        return not torch.is_grad_enabled() and not any(user.op == "output" for user in node.users)
    is_copy = any(given is True for given in (*node.args[2:], *node.kwargs.values()))
    may_be = packet(node) in g.VIEWS and not is_copy
    if packet(node) in (aten.div, aten.clone):  # kwargs are a way of rounding, a memory format
        is_told = {memory(x), memory(node)} & told
        may_be = node.args[1:] in ((), (1,)) and not node.kwargs and not is_told
    return may_be and g.same(g.layout(val(x)), g.layout(val(node)))


def _without_writes(graph: Graph) -> None:
    """`base[i:j] = value` as a new tensor, where nobody reads `base` in between or by another name
    later: nothing may move past a write, and some models turn their queries so."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for base in filter(is_tensor, list(graph.nodes)):
        writes = sorted((w for view in base.users if (w := _write_to(view))), key=place.get)
        if not writes or not _is_private(place, base, writes):
            continue
        whole = base
        for write in writes:
            view, *values = write.args
            arguments = write.target, whole, view.args[1:], values, write.kwargs
            whole, _ = g.insert(write, functionalize(_written), *arguments)
            graph.erase_node(write)
            graph.erase_node(view)
        for user in [n for n in base.users if place.get(n, -1) > place[writes[-1]]]:
            user.replace_input_with(base, whole)


def _written(write: Callable, whole: Tensor, part: tuple, values: list, more: dict) -> Tensor:
    if write is aten.copy_.default:
        return aten.slice_scatter(whole, values[0].expand_as(aten.slice(whole, *part)), *part)
    copy = whole.clone()
    write(aten.slice(copy, *part), *values, **more)
    return copy


def _write_to(view: Node) -> Node | None:
    """The write in place that is the only user of a slice."""
    write, *others = (*view.users, None)
    if packet(view) is not aten.slice or others != [None] or write.users or not mutates(write):
        return None
    tags, (first, *more) = {*write.target.tags}, write.target._schema.arguments
    is_first = first.is_write and not any(x.is_write for x in more)
    fits = is_first and not tags & {torch.Tag.inplace_view, g.RANDOM}
    return write if fits and write.args[0] is view not in write.args[1:] else None


def _is_private(place: dict[Node, int], base: Node, writes: list[Node]) -> bool:
    """Whether what is written is read by users of `base` alone, and after the last write."""
    first, last, views = place[writes[0]], place[writes[-1]], {write.args[0] for write in writes}
    names = [n for n in place if n not in views and place[n] <= last and memory(n) == memory(base)]
    return all(node.op == "call_function" for node in names) and not any(
        place[user] > first and user not in views and not (node is base and place[user] > last)
        for node in names for user in node.users
    )  # fmt: skip
