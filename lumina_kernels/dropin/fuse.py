"""The pass: which parts of a graph become ops, in which order, and where they go."""

from collections.abc import Callable, Iterable

import torch
from torch.fx import Graph, GraphModule, Node

from lumina_kernels.dropin import activations, attention, gates, norms, rotations
from lumina_kernels.dropin.evaluate import ARITHMETIC, VIEWS
from lumina_kernels.dropin.graph import aten, is_cast, is_tensor, mutates, packet, unwidened, val
from lumina_kernels.dropin.report import Site
from lumina_kernels.dropin.writes import without_writes


def fuse(gm: GraphModule, backend: str | None = None) -> list[Site]:
    """Rewrite a graph of whole ATen ops (`capture`) in place, onto ops with `backend`.

    Returns what was found: what became of it, or why it was left."""
    graph = gm.graph
    without_writes(graph)
    _clean(graph)
    rewriting = _Rewriting(graph)
    for step in (_rotations, _attentions, _gates, _norms, _activations):
        step(rewriting)
        graph.eliminate_dead_code()
    for node in graph.nodes:
        if getattr(node.target, "__module__", "").startswith("lumina_kernels.ops."):
            node.update_kwarg("backend", backend)
    graph.lint()
    gm.recompile()
    return rewriting.sites


class _Rewriting:
    """The graph, the order of its nodes, and what was done."""

    def __init__(self, graph: Graph):
        self.graph, self.sites = graph, []
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = [node for node in graph.nodes if mutates(node)]

    def replace(
        self, kind: str, roots: list[Node], emit: Callable[[], Iterable[Node] | None]
    ) -> bool:
        """Put what `emit` makes before the first of `roots` in their place."""
        first = min(roots, key=self.place.__getitem__)
        before = first.prev
        with self.graph.inserting_before(first):
            outs = emit()
        if outs is not None:
            made = self._between(before, first)
            if (reason := self._refusal(first, roots, made, outs)) is None:
                for root, out in zip(roots, outs, strict=True):
                    out.meta["val"] = (
                        val(root) if out.meta["val"].shape == val(root).shape else out.meta["val"]
                    )
                    root.replace_all_uses_with(out)
                    self.place[out] = self.place[root]
                for node in made:
                    self.place.setdefault(node, self.place[first])
                op = next(name for name in map(_op_name, made) if name)
                self.sites.append(Site(kind, roots[0].name, op, None))
                return True
        else:
            reason = "shapes"
        for node in reversed(self._between(before, first)):
            self.graph.erase_node(node)
        self.leave(kind, roots[0], reason)
        return False

    def leave(self, kind: str, node: Node, reason: str) -> None:
        self.sites.append(Site(kind, node.name, None, reason))

    def _between(self, before: Node, first: Node) -> list[Node]:
        made, node = [], before.next
        while node is not first:
            made.append(node)
            node = node.next
        return made

    def _refusal(self, first, roots, made, outs) -> str | None:
        for root, out in zip(roots, outs, strict=True):
            want, got = val(root), val(out)
            if want.dtype != got.dtype or str(want.shape) != str(got.shape):
                return (
                    f"{got.dtype} {tuple(got.shape)} in place of {want.dtype} {tuple(want.shape)}"
                )
        read = {n for node in made for n in node.all_input_nodes if n not in made}
        late = self._late(first, read)
        if late is None:
            return "its inputs come later"
        for node in late:  # in their order
            made[0].prepend(node)
            self.place[node] = self.place[first]
        last = max(self.place[root] for root in roots)
        for write in self.writes:
            if self.place[write] < last and any(_may_alias(write, n) for n in read):
                return "written to in place"
        return None

    def _late(self, first: Node, read: Iterable[Node]) -> list[Node] | None:
        """What has to move before `first` so that `read` is there; None if it cannot."""
        found, stack = set(), list(read)
        while stack:
            node = stack.pop()
            if self.place[node] < self.place[first] or node in found:
                continue
            if node is first or self.writes or packet(node) not in VIEWS | ARITHMETIC:
                return None
            found.add(node)
            stack.extend(node.all_input_nodes)
        return sorted(found, key=self.place.__getitem__)


def _op_name(node: Node) -> str | None:
    """Of an op of this package, or of ATen's one that is as good."""
    if getattr(node.target, "__module__", "").startswith("lumina_kernels.ops."):
        return node.target.__name__
    return "addcmul" if packet(node) is aten.addcmul else None


def _may_alias(write: Node, read: Node) -> bool:
    if not is_tensor(read):
        return False
    storages = {val(n).untyped_storage()._cdata for n in write.all_input_nodes if is_tensor(n)}
    return val(read).untyped_storage()._cdata in storages


def _clean(graph: Graph) -> None:
    """Drop what computes nothing, and compute once what is computed twice."""
    for node in list(graph.nodes):
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if packet(node) is aten.dropout and (not node.args[2] or node.args[1] == 0):
            node.replace_all_uses_with(source)
        elif (
            is_cast(node)
            and val(node).dtype == val(source).dtype
            and val(node).device == val(source).device
        ):
            node.replace_all_uses_with(source)
        elif (
            packet(node) is aten.slice
            and is_tensor(node)
            and str(val(node).shape) == str(val(source).shape)
        ):
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()
    if not any(mutates(node) for node in graph.nodes):
        _merge_equal(graph)


def _merge_equal(graph: Graph) -> None:
    seen = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_tensor(node) or _is_random(node):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _rotations(rewriting: _Rewriting) -> None:
    for node in list(rewriting.graph.nodes):
        if attention.arguments(node) is None:
            continue
        found = []
        for operand in node.args[:2]:
            for root, heads_second in rotations.parts(operand):
                if r := rotations.rotation_of(root, heads_second):
                    if all(root is not other for other, *_ in found):
                        found.append((root, heads_second, r))
        while found:
            first = found.pop(0)
            partners = [other for other in found if other[2].table == first[2].table]
            both = [first, *partners[:1]]
            if len(both) == 2 and rewriting.replace(
                "rotation",
                [root for root, *_ in both],
                lambda: rotations.emit(rewriting.graph, both),
            ):
                found.remove(both[1])
                continue
            rewriting.replace(
                "rotation", [first[0]], lambda: rotations.emit(rewriting.graph, [first])
            )


def _attentions(rewriting: _Rewriting) -> None:
    for node in list(rewriting.graph.nodes):
        if found := attention.gated_text_of(node):
            rewriting.replace(
                "attention and text", [node],
                lambda: [attention.emit_gated_text(rewriting.graph, found)],
            )  # fmt: skip
    rewriting.graph.eliminate_dead_code()
    for node in list(rewriting.graph.nodes):
        if attention.arguments(node) is None:
            continue
        if reason := attention.refusal(node):
            rewriting.leave("attention", node, reason)
        else:
            rewriting.replace("attention", [node], lambda: [attention.emit(rewriting.graph, node)])


def _gates(rewriting: _Rewriting) -> None:
    after = {}
    for root, n in norms.roots(rewriting.graph):
        after.setdefault(unwidened(n.x), (root, n))
    for node in list(rewriting.graph.nodes):
        if not node.users or (r := gates.residual_of(node)) is None:
            continue
        if node in after:
            root, n = after[node]
            if rewriting.replace(
                "residual and norm", [node, root],
                lambda: gates.emit_with_norm(rewriting.graph, node, r, n),
            ):  # fmt: skip
                continue
        if r.gate is not None or r.norm is not None:
            rewriting.replace(
                "residual", [node], lambda: _one(gates.emit_alone(rewriting.graph, node, r))
            )


def _norms(rewriting: _Rewriting) -> None:
    for node, n in norms.roots(rewriting.graph):
        rewriting.replace("norm", [node], lambda: _one(norms.emit(rewriting.graph, node, n)))


def _activations(rewriting: _Rewriting) -> None:
    graph = rewriting.graph
    for node in list(graph.nodes):
        if pair := activations.glu_of(node):
            rewriting.replace("glu", [node], lambda: [activations.emit(graph, node, pair)])
        elif packet(node) is aten.gelu:
            rewriting.replace("gelu", [node], lambda: [activations.emit_gelu(graph, node)])


def _one(node: Node | None) -> list[Node] | None:
    return None if node is None else [node]
