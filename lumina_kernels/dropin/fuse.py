"""The pass: which parts of a graph become ops, in which order, and where they go."""

from collections.abc import Container, Iterable
from dataclasses import replace

from torch.fx import Graph, GraphModule, Node

from lumina_kernels.dropin.attention import attentions
from lumina_kernels.dropin.capture import clean, flat, mutates
from lumina_kernels.dropin.evaluate import VIEWS
from lumina_kernels.dropin.graph import (
    Calls,
    Match,
    aten,
    is_cast,
    is_op,
    is_tensor,
    packet,
    same,
    val,
)
from lumina_kernels.dropin.report import Site
from lumina_kernels.dropin.rotations import rotations
from lumina_kernels.dropin.rows import activations, norms, residuals

# What is named as left where nothing took its place. A sum of squares is a norm written out.
KINDS = {
    aten.scaled_dot_product_attention: "attention", aten.layer_norm: "norm", aten.rms_norm: "norm",
    aten.rsqrt: "norm", aten.gelu: "gelu", aten.silu: "glu",
}  # fmt: skip


def fuse(
    gm: GraphModule, backend: str | None = None, exact: bool = False
) -> tuple[GraphModule, list[Site]]:
    """Rewrite a graph of whole ATen ops (`capture`) onto ops with `backend`.

    Returns the new graph and what was found: what became of it, or why it was left."""
    graph = gm.graph
    clean(graph)
    rewriting = _Rewriting(graph, backend, exact)
    for find in (rotations, attentions, residuals, norms, activations):
        for match in find(graph):
            rewriting.replace(match)
        if not rewriting.writes:
            _in_order(graph)
        graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    whole, backends = flat(gm)
    fused = [replace(site, backend=backends.get(site.op, "torch")) for site in rewriting.sites]
    return whole, [*fused, *rewriting.left()]


class _Rewriting:
    """A graph on its way onto the ops, and what was done."""

    def __init__(self, graph: Graph, backend: str | None, exact: bool):
        self.graph, self.backend, self.exact = graph, backend, exact
        self.sites: list[Site] = []
        self.refused: dict[Node, Site] = {}
        self.writes = [node for node in graph.nodes if mutates(node)]

    def replace(self, match: Match) -> None:
        """Put what a match makes before the first of its roots in their place, if it may be."""
        place = {node: i for i, node in enumerate(self.graph.nodes)}
        first = min(match.roots, key=place.__getitem__)
        before = first.prev
        with self.graph.inserting_before(first):
            try:
                outs = match.emit(Calls(self.graph, self.backend))
                made = self._made(before, first)
                reason = (
                    "dtypes differ" if outs is None else self._refusal(match, place, made, outs)
                )
            except (ValueError, TypeError, RuntimeError) as error:  # the op does not take these
                made, reason = self._made(before, first), str(error).partition("\n")[0]
        name = match.roots[0].name
        if reason is not None:
            for node in reversed(made):
                self.graph.erase_node(node)
            self.refused.setdefault(match.roots[0], Site(match.kind, name, None, reason))
            return
        for root, out in zip(match.roots, outs, strict=True):
            root.replace_all_uses_with(out)
        op = next((node for node in reversed(made) if is_op(node.target)), outs[0])
        self.sites.append(Site(match.kind, name, op.target.__name__.partition(".")[0], None))

    def left(self) -> list[Site]:
        """What is still there."""
        sites = [s for s in self.refused.values() if s.kind in ("rotation", "residual")]
        for node in self.graph.nodes:
            kind = KINDS.get(packet(node))
            is_gate = kind == "glu" and not any(packet(user) is aten.mul for user in node.users)
            if kind and not is_gate:
                below = [node]
                for n in below:  # the match that it was part of
                    below += [user for user in n.users if len(below) < 20]
                refused = [self.refused[n].reason for n in below if n in self.refused]
                sites.append(Site(kind, node.name, None, (*refused, "not recognised")[0]))
        return [site for site in sites if site is not None]

    def _made(self, before: Node, first: Node) -> list[Node]:
        made, node = [], before.next
        while node is not first:
            made.append(node)
            node = node.next
        return made

    def _refusal(self, match: Match, place: dict, made: list[Node], outs: list[Node]) -> str | None:
        for root, out in zip(match.roots, outs, strict=True):
            if val(root).dtype != val(out).dtype or not same(val(root).shape, val(out).shape):
                return f"would be {val(out).dtype} {tuple(val(out).shape)}"
        read = {n for node in made for n in node.all_input_nodes} - set(made)
        if (read | _above(read, ())) & set(match.roots):
            return "its inputs need its result"
        if self.exact and "attention" in match.kind:
            return "exact=True"
        if self.exact and any(map(_rounds, _above(match.roots, read))):
            return "exact=True, and eager rounds in between"
        first, last = min(map(place.get, match.roots)), max(map(place.get, match.roots))
        if self.writes and any(place[n] > first for n in read):
            return "its inputs come later, beside a write in place"
        storages = {val(n).untyped_storage()._cdata for n in read if is_tensor(n)}
        written = (n for w in self.writes if place[w] < last for n in w.all_input_nodes)
        if any(is_tensor(n) and val(n).untyped_storage()._cdata in storages for n in written):
            return "written to in place"
        return None


def _above(nodes: Iterable[Node], stop: Container[Node]) -> set[Node]:
    """What nodes are computed from, down to `stop`."""
    found, stack = set(), [n for node in nodes for n in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found and node not in stop:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _rounds(node: Node) -> bool:
    is_view = packet(node) in VIEWS and not is_cast(node)
    return (
        is_tensor(node)
        and not is_view
        and val(node).is_floating_point()
        and (val(node).itemsize < 4)
    )


def _in_order(graph: Graph) -> None:
    """Move nodes before their users where they are not."""
    seen = set()

    def put(node, anchor):
        for source in node.all_input_nodes:
            if source not in seen:
                put(source, anchor)
        if node is not anchor:
            anchor.prepend(node)
        seen.add(node)

    for node in list(graph.nodes):
        if node not in seen:
            put(node, node)
