"""In-place writes into parts of a tensor, as the concatenation or interleaving of its parts.

Some models fill an empty tensor slice by slice, or turn some tokens of the queries where they lie.
Nothing may move past such a write; without it the pass sees what is computed.
"""

from torch.fx import Graph, Node

from lumina_kernels.dropin.graph import aten, call, is_tensor, packet, size_of, val


def without_writes(graph: Graph) -> None:
    """Replace the writes of which all can be said: those into slices of a tensor that nobody reads
    in between, nor under another name afterwards."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for base in list(graph.nodes):
        writes = [w for user in base.users if (w := _write_to(user))]
        if not writes or base.op != "call_function" or not _is_private(graph, place, base, writes):
            continue
        last = max(writes, key=place.__getitem__)
        with graph.inserting_after(last):
            anchor = graph.call_function(_nothing)
        with graph.inserting_before(anchor):
            whole = _assembled(graph, base, writes)
        graph.erase_node(anchor)
        if whole is None:
            continue
        views = [write.args[0] for write in writes]
        for node in [*writes, *views]:
            graph.erase_node(node)
        base.replace_all_uses_with(whole, delete_user_cb=lambda user: place.get(user, -1) > place[last])


def _nothing() -> None: ...


def _write_to(view: Node) -> Node | None:
    """The `copy_` that is the only user of a slice."""
    if packet(view) is not aten.slice or len(view.users) != 1:
        return None
    write = next(iter(view.users))
    own = packet(write) is aten.copy_ and write.args[0] is view and not write.users
    return write if own and str(val(write.args[1]).shape) == str(val(view).shape) else None


def _is_private(graph: Graph, place: dict, base: Node, writes: list[Node]) -> bool:
    """Whether what is written is read by users of `base` alone, and after the last write."""
    first, last = min(map(place.get, writes)), max(map(place.get, writes))
    views = {write.args[0] for write in writes}
    storage = val(base).untyped_storage()._cdata
    for node in graph.nodes:
        if not is_tensor(node) or val(node).untyped_storage()._cdata != storage:
            continue
        if node in views or place[node] > last:
            continue
        for user in node.users:
            if user in views or (node is base and place[user] > last):
                continue
            if place[user] > first:
                return False
    return True


def _assembled(graph: Graph, base: Node, writes: list[Node]) -> Node | None:
    """The tensor after the writes, of parts that are next to each other or take turns."""
    parts = []
    for write in writes:
        dim, start, end, step = (*write.args[0].args[1:], 0, None, 1)[:4]
        parts.append((dim % val(base).ndim, start, end, step, write.args[1]))
    dims, steps = {p[0] for p in parts}, {p[3] for p in parts}
    if len(dims) > 1 or len(steps) > 1 or any(not isinstance(p[1], int) for p in parts):
        return None
    (dim,), (step,), parts = dims, steps, sorted(parts, key=lambda p: p[1])
    dtype = val(base).dtype
    values = [call(graph, aten.to.dtype, p[4], dtype) for p in parts]
    if step > 1:
        whole = [p[1] for p in parts] == list(range(step)) and dim == val(base).ndim - 1
        if not whole:
            return None
        return call(graph, aten.flatten.using_ints, call(graph, aten.stack.default, values, -1), -2)
    pieces, done = [], 0
    for (_, start, end, _, _), value in zip(parts, values, strict=True):
        if start < done:
            return None
        if start > done:
            pieces.append(call(graph, aten.slice.Tensor, base, dim, done, start))
        pieces.append(value)
        done = end if isinstance(end, int) else size_of(graph, base, dim)
    if isinstance(done, int) and done < 2**62:
        pieces.append(call(graph, aten.slice.Tensor, base, dim, done, 2**63 - 1))
    return call(graph, aten.cat.default, pieces, dim)
