"""From the graph that Dynamo hands to a backend to one of whole ATen ops, and to one of kernels."""

import re
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._pytree import tree_leaves

from .graph import RANDOM, Calls, aten, is_tensor, live, memory, packet, same, val

# What Dynamo calls to change the mode of what comes after.
SWITCHES = "_set_grad_enabled", "_enter_autocast", "_exit_autocast"
# Where the functions are that make a gradient another one than that of what is computed.
CUSTOM = re.compile(r"torch\.(_C|_C\._autograd|_C\._functorch|_functorch\..*|autograd\..*|amp\..*)")
OTHERS = "requires_grad_", "register_hook", "retain_grad", "as_strided"
AROUND = "which around whole blocks does no harm"


def capture(gm: GraphModule) -> GraphModule:
    """The same in ATen ops as autograd sees them: linear, layer_norm, attention are still one node
    each. Every node has its fake result in meta["val"], which requires a gradient if it may."""
    whole = _traced(_InOneMode(gm).run, [n.meta.get("example_value") for n in _inputs(gm)])
    for node in whole.graph.nodes if torch.is_grad_enabled() else ():
        sources = _tensors([n.meta.get("val") for n in node.all_input_nodes])
        if packet(node) is not aten.detach and any(x.requires_grad for x in sources):
            for x in _tensors(node.meta.get("val")):
                x.requires_grad_(x.is_floating_point() or x.is_complex())
    return whole


def flat(gm: GraphModule) -> tuple[GraphModule, dict[Node, str]]:
    """The graph with registered kernels in place of the public functions, which have checked their
    arguments; without autograd where nothing asks for it. And the backend of each of these."""
    noting, backends = _Noting(gm), {}
    whole = _traced(noting.run, [n.meta.get("val") for n in _inputs(gm)])
    for public, node in noting.kernels.items():
        backends[public] = node.args[-1]
        if node.args[-1] in ("cpu", "cuda") and not torch.is_grad_enabled():
            native = getattr(torch.ops.lumina_kernels_cpp, node.target._opname)
            node.target, node.args = native.default, node.args[:-1]
    clean(whole.graph)
    whole.recompile()
    return whole, backends


def _inputs(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _traced(run: Callable, inputs: list) -> GraphModule:
    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    if mode is None:
        raise NotImplementedError("no tensor comes in")
    with mode, tracing(TracingContext(mode)):  # not the fresh one that Dynamo has for backends
        whole = make_fx(run, pre_dispatch=True)(*inputs)
    for node, x in zip(_inputs(whole), inputs, strict=True):
        node.meta["val"] = x  # not detached
    return whole


class _InOneMode(Interpreter):
    """Runs a graph as if it changed no mode, and raises if that makes a difference."""

    def run(self, *inputs):
        self.results = {}
        out = super().run(*inputs)
        for node, got in self.results.items():  # with what was written to them
            want = node.meta.get("example_value")
            a, b = ([(x.dtype, x.requires_grad) for x in _tensors(y)] for y in (want, got))
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


class _Noting(Interpreter):
    """Notes which kernel each public function calls while it is traced."""

    def __init__(self, gm: GraphModule):
        super().__init__(gm)
        self.kernels = {}

    def run_node(self, node):
        traced = get_proxy_mode().tracer.graph.nodes
        before = len(traced)
        out = super().run_node(node)
        for new in islice(reversed(traced), len(traced) - before):
            if getattr(new.target, "namespace", "") == "lumina_kernels":
                self.kernels[node] = new
        return out


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def clean(graph: Graph) -> None:
    """Drop what computes nothing or a second time, and writes in place that nobody can tell."""
    written = {memory(n) for w in graph.nodes if mutates(w) for n in w.all_input_nodes}
    returned = {memory(n) for n in graph.output_node().all_input_nodes}
    for node in live(graph):
        if _is_idle(node) or _is_needless_copy(node, written, returned):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code(lambda node: node.is_impure() or mutates(node))
    _without_writes(graph)
    seen = {}
    for node in live(graph) if not any(map(mutates, graph.nodes)) else ():
        tags = getattr(node.target, "tags", ())
        if is_tensor(node) and RANDOM not in tags:
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


def _is_idle(node: Node) -> bool:
    """Whether a node returns what it was given."""
    if packet(node) is aten.dropout:
        return not node.args[2] or node.args[1] == 0
    if packet(node) is aten.detach:
        is_returned = any(user.op == "output" for user in node.users)
        return not torch.is_grad_enabled() and not is_returned
    may_be = packet(node) in (aten.to, aten.type_as, aten.slice, aten.expand, aten.flatten)
    is_copy = any(x is True for x in (*node.args[2:], *node.kwargs.values()))
    return may_be and not is_copy and _has_same(node)


def _is_needless_copy(node: Node, written: set, returned: set) -> bool:
    """Whether a node is x / 1, which nobody can tell from x."""
    if packet(node) is not aten.div or node.args[1] != 1 or not is_tensor(node.args[0]):
        return False
    is_told = {memory(node), memory(node.args[0])} & written or memory(node) in returned
    return not is_told and _has_same(node)


def _has_same(node: Node) -> bool:
    """Whether a node has the dtype, the device and the layout of what it was given."""
    x, y = val(node.args[0]), val(node)
    where = x.dtype == y.dtype and x.device == y.device
    return where and same((*x.shape, *x.stride()), (*y.shape, *y.stride()))


def _without_writes(graph: Graph) -> None:
    """`base[i:j] = value` as a new tensor, where nobody reads `base` in between or by another name
    later: nothing may move past a write, and some models turn their queries so."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for base in list(graph.nodes):
        writes = [w for view in base.users if (w := _write_to(view))] if is_tensor(base) else []
        writes.sort(key=place.__getitem__)
        if not writes or not _is_private(place, base, writes):
            continue
        whole = base
        for write in writes:
            view, *value = write.args
            with graph.inserting_before(write):
                call = Calls(graph)
                if packet(write) is not aten.copy_:
                    part = call(aten.slice.Tensor, whole, *view.args[1:])
                    value = [call(_computed(write), part, *value, **write.kwargs)]
                whole = call(aten.slice_scatter.default, whole, value[0], *view.args[1:])
            graph.erase_node(write)
            graph.erase_node(view)
        for user in list(base.users):
            if place.get(user, -1) > place[writes[-1]]:
                user.replace_input_with(base, whole)


def _write_to(view: Node) -> Node | None:
    """The write in place that is the only user of a slice."""
    write = next(iter(view.users), None)
    if packet(view) is not aten.slice or len(view.users) > 1 or write.users:
        return None
    is_copy = packet(write) is aten.copy_ and same(val(write.args[1]).shape, val(view).shape)
    is_known = is_copy or packet(write) is not aten.copy_ and _computed(write) is not None
    return write if is_known and write.args[0] is view and view not in write.args[1:] else None


def _computed(write: Node):
    """The op that computes what one in place writes, or None."""
    name, tags = getattr(packet(write), "__name__", ""), getattr(write.target, "tags", ())
    op = getattr(aten, name[:-1], None) if name.endswith("_") else None
    op = getattr(op, getattr(write.target, "_overloadname", ""), None)
    if op is None or {torch.Tag.inplace_view, RANDOM} & {*tags}:
        return None
    a, b = ([(x.name, str(x.type)) for x in o._schema.arguments] for o in (op, write.target))
    return op if a == b else None


def _is_private(place: dict[Node, int], base: Node, writes: list[Node]) -> bool:
    """Whether what is written is read by users of `base` alone, and after the last write."""
    first, last, views = place[writes[0]], place[writes[-1]], {write.args[0] for write in writes}
    names = [n for n in place if n not in views and place[n] <= last and memory(n) == memory(base)]
    return all(node.op == "call_function" for node in names) and not any(
        place[user] > first and user not in views and not (node is base and place[user] > last)
        for node in names for user in node.users
    )  # fmt: skip
