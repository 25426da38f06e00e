"""From the graph that Dynamo hands to a backend to one of whole ATen ops, without what computes
nothing, nothing twice, and few writes in place."""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lumina_kernels.dropin.graph import Calls, aten, is_cast, is_tensor, packet, same, val


def capture(gm: GraphModule) -> GraphModule:
    """The same computation in ATen ops as autograd sees them: linear, layer_norm, rms_norm and
    scaled_dot_product_attention are one node each. Every node has its fake result in meta["val"].
    """
    inputs = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    return _traced(gm, inputs)


def flat(gm: GraphModule) -> tuple[GraphModule, dict[str, str]]:
    """The graph with the registered kernels in place of the public functions, which have checked
    their arguments; without autograd where nothing asks for a gradient. And the backend of each op,
    by name."""
    whole = _traced(gm, [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"])
    backends = {}
    for node in whole.graph.nodes:
        if getattr(node.target, "namespace", "") == "lumina_kernels":
            name = node.target._opname
            backend = backends[name.removesuffix("_fwd")] = node.args[-1]
            if backend in ("cpu", "cuda") and not torch.is_grad_enabled():
                native = getattr(torch.ops.lumina_kernels_cpp, name)
                node.target, node.args = native.default, node.args[:-1]
    clean(whole.graph)
    whole.recompile()
    return whole, backends


def _traced(gm: GraphModule, inputs: list) -> GraphModule:
    # That of these values, not the fresh one which Dynamo has ready for backends.
    modes = [x.fake_mode for x in inputs if isinstance(x, FakeTensor)]
    modes += [m.fake_mode for m in (*gm.parameters(), *gm.buffers()) if isinstance(m, FakeTensor)]
    with modes[0]:
        return make_fx(gm, pre_dispatch=True)(*inputs)


def clean(graph: Graph) -> None:
    """Drop what computes nothing, compute once what is computed twice, and make new tensors of
    those that are written to in place, where nobody can tell."""
    for node in list(graph.nodes):
        if _is_idle(node):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    _without_writes(graph)
    if any(mutates(node) for node in graph.nodes):
        return
    seen = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_tensor(node) or _is_random(node):
            continue
        first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def mutates(node: Node) -> bool:
    """Whether a node writes to a tensor, or does something else that its place decides about."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema.is_mutable if schema else node.is_impure())


def _is_idle(node: Node) -> bool:
    op, source = packet(node), node.args[0] if node.args else None
    if op is aten.dropout:
        return not node.args[2] or node.args[1] == 0
    if not is_tensor(node) or not (is_cast(node) or op in (aten.slice, aten.expand)):
        return False
    x, y = val(source), val(node)
    return x.dtype == y.dtype and x.device == y.device and same(x.shape, y.shape)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _without_writes(graph: Graph) -> None:
    """`base[i:j] = value` as a new tensor, where nobody reads `base` in between or by another name
    later. Some models fill an empty tensor so, or turn some tokens of the queries where they lie,
    and nothing may move past such a write."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for base in list(graph.nodes):
        writes = [write for view in base.users if (write := _write_to(view))]
        if not writes or base.op != "call_function" or not _is_private(place, base, writes):
            continue
        whole = base
        for write in sorted(writes, key=place.__getitem__):
            view, value = write.args[:2]
            with graph.inserting_before(write):
                whole = Calls(graph)(aten.slice_scatter.default, whole, value, *view.args[1:])
            last = place[write]
            graph.erase_node(write)
            graph.erase_node(view)
        base.replace_all_uses_with(whole, delete_user_cb=lambda user, last=last: place.get(user, -1) > last)


def _write_to(view: Node) -> Node | None:
    """The `copy_` that is the only user of a slice."""
    if packet(view) is not aten.slice or len(view.users) != 1:
        return None
    write = next(iter(view.users))
    own = packet(write) is aten.copy_ and write.args[0] is view and not write.users
    return write if own and same(val(write.args[1]).shape, val(view).shape) else None


def _is_private(place: dict[Node, int], base: Node, writes: list[Node]) -> bool:
    """Whether what is written is read by users of `base` alone, and after the last write."""
    first, last = min(map(place.get, writes)), max(map(place.get, writes))
    views = {write.args[0] for write in writes}
    storage = val(base).untyped_storage()._cdata
    names = [n for n in place if is_tensor(n) and val(n).untyped_storage()._cdata == storage]
    return not any(
        node.op != "call_function"
        or (first < place[user] and user not in views and not (node is base and place[user] > last))
        for node in names if node not in views and place[node] <= last
        for user in node.users
    )  # fmt: skip
