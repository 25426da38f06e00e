"""From the graph that Dynamo hands to a backend to one of whole ATen ops, and to one of kernels."""

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .graph import Calls, aten, is_tensor, live, memory, packet, same, val


def capture(gm: GraphModule) -> GraphModule:
    """The same in ATen ops as autograd sees them: linear, layer_norm, attention are still one node
    each. Every node has its fake result in meta["val"]."""
    return _traced(gm, "example_value")


def flat(gm: GraphModule) -> tuple[GraphModule, dict[str, str]]:
    """The graph with registered kernels in place of the public functions, which have checked their
    arguments; without autograd where nothing asks for it. And the backend of each op, by name."""
    whole, backends = _traced(gm, "val"), {}
    for node in whole.graph.nodes:
        if getattr(node.target, "namespace", "") == "lumina_kernels":
            name, backend = node.target._opname, node.args[-1]
            backends[name.removesuffix("_fwd")] = backend
            if backend in ("cpu", "cuda") and not torch.is_grad_enabled():
                native = getattr(torch.ops.lumina_kernels_cpp, name)
                node.target, node.args = native.default, node.args[:-1]
    clean(whole.graph)
    whole.recompile()
    return whole, backends


def _traced(gm: GraphModule, name: str) -> GraphModule:
    inputs = [n.meta.get(name) for n in gm.graph.nodes if n.op == "placeholder"]
    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    with mode, tracing(TracingContext(mode)):  # not the fresh one that Dynamo has for backends
        return make_fx(gm, pre_dispatch=True)(*inputs)


def clean(graph: Graph) -> None:
    """Drop what computes nothing or a second time, and writes in place that nobody can tell."""
    for node in live(graph):
        if _is_idle(node):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    _without_writes(graph)
    seen = {}
    for node in live(graph) if not any(map(mutates, graph.nodes)) else ():
        tags = getattr(node.target, "tags", ())
        if is_tensor(node) and torch.Tag.nondeterministic_seeded not in tags:
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def mutates(node: Node) -> bool:
    """Whether a node writes to a tensor, or does something else that its place decides about."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema.is_mutable if schema else node.is_impure())


def _is_idle(node: Node) -> bool:
    """Whether a node returns what it was given."""
    if packet(node) is aten.dropout:
        return not node.args[2] or node.args[1] == 0
    may_be = packet(node) in (aten.to, aten.type_as, aten.slice, aten.expand, aten.flatten)
    may_be |= packet(node) is aten.div and node.args[1] == 1 and is_tensor(node.args[0])
    if not may_be or True in (*node.args[2:], *node.kwargs.values()):  # copy=True
        return False
    x, y = val(node.args[0]), val(node)
    return x.dtype == y.dtype and x.device == y.device and same(x.shape, y.shape)


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
            view, value = write.args[:2]
            with graph.inserting_before(write):
                call, op = Calls(graph), packet(write)
                if op is not aten.copy_:
                    part = call(aten.slice.Tensor, whole, *view.args[1:])
                    value = call(_without_underscore(op), part, *write.args[1:])
                whole = call(aten.slice_scatter.default, whole, value, *view.args[1:])
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
    is_known = is_copy or _without_underscore(packet(write)) not in (None, aten.copy)
    return write if is_known and write.args[0] is view and view not in write.args[1:] else None


def _without_underscore(op):
    """The op that computes what one in place writes, or None."""
    name = getattr(op, "__name__", "")
    return getattr(aten, name[:-1], None) if name.endswith("_") else None


def _is_private(place: dict[Node, int], base: Node, writes: list[Node]) -> bool:
    """Whether what is written is read by users of `base` alone, and after the last write."""
    first, last, views = place[writes[0]], place[writes[-1]], {write.args[0] for write in writes}
    names = [n for n in place if n not in views and place[n] <= last and memory(n) == memory(base)]
    return all(node.op == "call_function" for node in names) and not any(
        place[user] > first and user not in views and not (node is base and place[user] > last)
        for node in names for user in node.users
    )  # fmt: skip
