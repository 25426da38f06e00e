"""The pass: which parts of a graph become ops, in which order, and where they go."""

from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from lumina_kernels.patch_report import Site

from .attention import attentions
from .capture import clean, flat, mutates
from .evaluate import MOVES
from .graph import CASTS, Calls, aten, is_tensor, memory, narrowed, narrows, packet, same, val
from .rotations import rotations
from .rows import activations, norms, residuals

# What is named as left where nothing took its place; an rsqrt is the one of a norm written out.
KINDS = {
    aten.scaled_dot_product_attention: "attention", aten.layer_norm: "norm", aten.rms_norm: "norm",
    aten.rsqrt: "norm", aten.gelu: "gelu", aten.silu: "glu", aten.softmax: "softmax",
}  # fmt: skip
PARTS = {"glu": aten.mul, "softmax": aten.matmul}  # by what it has to be used to count as one


def fuse(gm: GraphModule, backend: str | None = None, exact: bool = False) -> tuple:
    """Rewrite a graph of whole ATen ops (`capture`) onto ops with `backend`. Returns the new graph
    and a list of `Site`s: what was found, what became of it, or why it was left."""
    graph = gm.graph
    before = [val(n) if is_tensor(n) else None for n in _outputs(graph)]
    clean(graph)
    rewriting = _Rewriting(graph, backend, exact)
    for find in (rotations, attentions, residuals, norms, activations):
        for match in find(graph):
            rewriting.replace(*match)
        if not rewriting.writes:
            _in_order(graph)
    graph.lint()
    gm.recompile()
    whole, backends = flat(gm)
    _lay_out(whole.graph, before)
    whole.recompile()
    fused = [replace(site, backend=backends.get(op, "torch")) for site, op in rewriting.sites]
    return whole, [*fused, *rewriting.left()]


class _Rewriting:
    """A graph on its way onto the ops, and what was done."""

    def __init__(self, graph: Graph, backend: str | None, exact: bool):
        self.graph, self.backend, self.exact = graph, backend, exact
        self.sites, self.refused, self.erased = [], {}, set()
        self.writes = [node for node in graph.nodes if mutates(node)]

    def replace(self, kind: str, roots: list[Node], emit: Callable, *arguments) -> None:
        """Put what `emit` makes before the first of some nodes in their place, if it may be."""
        call = Calls(self.graph, self.backend)
        with self.graph.inserting_before(min(roots)):
            try:
                outs = emit(call, *arguments)
                outs = [outs] if isinstance(outs, Node) else outs
                outs = [narrowed(call, *pair) for pair in zip(outs, roots, strict=True)]
                reason = self._refusal(kind, roots, call.made, outs)
            except (ValueError, TypeError, RuntimeError) as error:  # the op does not take these
                reason = str(error).partition("\n")[0]
        if reason:
            for node in reversed(call.made):
                self.graph.erase_node(node)
            self.refused.setdefault(roots[0], Site(kind, roots[0].name, None, reason))
            return
        for root, out in zip(roots, outs, strict=True):
            root.replace_all_uses_with(out)
        op = next((node for node in call.made if "backend" in node.kwargs), outs[0])
        name = op.target.__name__.partition(".")[0]
        self.sites.append((Site(kind, roots[0].name, name, None), op))
        self._erase(roots)

    def _erase(self, nodes: list[Node]) -> None:
        """Erase nodes that nothing uses, and what they alone used."""
        for node in nodes:
            is_dead = not node.users and node.op == "call_function" and not mutates(node)
            if is_dead and node not in self.erased:
                self.erased.add(node)
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                self._erase(inputs)

    def _refusal(self, kind: str, roots: list, made: list, outs: list) -> str | None:
        for root, out in zip(roots, outs, strict=True):
            if val(root).dtype != val(out).dtype or not same(val(root).shape, val(out).shape):
                return f"would be {val(out).dtype} {tuple(val(out).shape)}"
        read = {n for node in made for n in node.all_input_nodes} - set(made)
        if len(roots) > 1 and (read | _above(read, ())) & set(roots):
            return "its inputs need its result"
        inside = {n for n in _above(roots, read) if is_tensor(n) and val(n).is_floating_point()}
        smallest = min(val(root).itemsize for root in roots)
        if any(narrows(node) and val(node).itemsize < smallest for node in inside):
            return "rounds to another dtype in between"
        rounds = any(val(n).itemsize < 4 and packet(n) not in MOVES - CASTS for n in inside)
        if self.exact and ("attention" in kind or rounds):
            return "exact=True, and eager rounds more than once"
        if self.writes and any(n > min(roots) for n in read):
            return "its inputs come later, beside a write in place"
        written = {n for w in self.writes if w < max(roots) for n in w.all_input_nodes}
        touched = {memory(n) for n in {*read, *inside, *roots}}
        is_hit = any(memory(w) in touched for w in written if is_tensor(w))
        return "written to in place" if is_hit else None

    def left(self) -> list[Site]:
        """What is still there."""
        sites = [s for n, s in self.refused.items() if n.users and s.kind not in KINDS.values()]
        for node in self.graph.nodes:
            if (kind := KINDS.get(packet(node))) is None:
                continue
            below, users = [node], {packet(u) for n in (node, *node.users) for u in n.users}
            if kind in PARTS and PARTS[kind] not in users:
                continue
            for n in below:  # the match that it was part of
                below += [user for user in n.users if len(below) < 20]
            reasons = [self.refused[n].reason for n in below if n in self.refused]
            sites.append(Site(kind, node.name, None, (*reasons, "not recognised")[0]))
        return sites


def _above(nodes: Iterable[Node], stop: Container[Node]) -> set[Node]:
    """What nodes are computed from, down to `stop`."""
    found, stack = set(), [n for node in nodes for n in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found and node not in stop:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _outputs(graph: Graph) -> list:
    return tree_leaves(graph.output_node().args[0])


def _lay_out(graph: Graph, before: list) -> None:
    """Give what a graph returns the strides that it had before: a caller may view it."""
    call, end, outputs = Calls(graph), graph.output_node(), _outputs(graph)
    shared = Counter(map(memory, {*outputs, *graph.find_nodes(op="placeholder")}))
    for node, like in zip(outputs, before, strict=True):
        if like is None or _has_strides(val(node), like):
            continue
        if shared[memory(node)] > 1:
            raise NotImplementedError("a view among the results would have other strides")
        order = sorted(range(like.ndim), key=lambda dim: -like.stride(dim))
        with graph.inserting_before(end):
            dense = call(aten.permute.default, node, order)
            dense = call(aten.clone.default, dense, memory_format=torch.contiguous_format)
            laid = call(aten.permute.default, dense, [order.index(d) for d in range(like.ndim)])
        end.replace_input_with(node, laid)


def _has_strides(x: Tensor, like: Tensor) -> bool:
    dims = (dim for dim, size in enumerate(like.shape) if not same(size, 1))
    return all(same(x.stride(dim), like.stride(dim)) for dim in dims)


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
