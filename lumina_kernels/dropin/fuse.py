"""The pass: which parts of a graph become ops, in which order, and where they go."""

from collections import Counter
from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor
from torch._guards import detect_fake_mode, tracing
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

from lumina_kernels.patch_report import Site, left

from .attention import attentions, rotations
from .capture import clean, mutates
from .graph import CASTS, MOVES, holds, insert, is_tensor, memory, narrows, packet, same, val
from .rows import activations, norms, residuals


def fuse(gm: GraphModule, backend: str | None = None, exact: bool = False) -> tuple:
    """Rewrite a graph of whole ATen ops (`capture`) onto ops with `backend`. Returns the new graph
    and a list of `Site`s: what was found, what became of it, or why it was left."""
    before = [val(n) if is_tensor(n) else None for n in tree_leaves(gm.graph.output_node().args)]
    clean(gm.graph)
    rewriting = _Rewriting(gm.graph, backend, exact)
    for find in (rotations, attentions, residuals, norms, activations):
        for match in find(gm.graph):
            rewriting.replace(*match)
    clean(gm.graph)
    inputs = list(map(val, gm.graph.find_nodes(op="placeholder")))
    with tracing(None):
        FakeTensorProp(gm, detect_fake_mode(inputs)).propagate_dont_convert_inputs(*inputs)
    _lay_out(gm.graph, before)
    gm.graph.lint()
    gm.recompile()
    return gm, [*rewriting.fused, *left(gm.graph, rewriting.refused)]


class _Rewriting:
    """A graph on its way onto the ops, and what was done."""

    def __init__(self, graph: Graph, backend: str | None, exact: bool):
        self.graph, self.backend, self.exact = graph, backend, exact
        self.fused, self.refused, self.writes = [], {}, list(filter(mutates, graph.nodes))

    def replace(self, kind: str, roots: list[Node], emit: Callable, *arguments) -> None:
        """Put what `emit` calls before the first of some nodes in their place, if it may be."""
        first, dtypes, made, named, ran = min(roots), [val(n).dtype for n in roots], [], [], "torch"

        def call(op, *args, **kwargs):
            named.append(op.__name__)
            return op(*args, **kwargs, backend=self.backend)

        def emitted(*args):
            outs = emit(call, *args)
            outs = [outs] if isinstance(outs, Tensor) else outs
            return [x.to(t) if holds(x.dtype, t) else x for x, t in zip(outs, dtypes, strict=True)]

        try:
            outs, made = insert(first, emitted, *arguments)
            read = {n for node in made for n in node.all_input_nodes} - {*made}
            reason = self._refusal(kind, roots, read, outs)
        except (ValueError, TypeError, RuntimeError) as error:  # the op does not take these
            reason = str(error).partition("\n")[0]
        if reason:
            for node in reversed(made):
                self.graph.erase_node(node)
            self.refused.setdefault(roots[0], Site(kind, roots[0].name, None, reason))
            return
        for node in sorted(n for n in read | _above(read, ()) if n > first):
            made[0].prepend(node)
        replaced = {*roots, *_above(roots, read)}
        for root, out in zip(roots, outs, strict=True):
            root.replace_all_uses_with(out)
        for node in sorted(replaced, reverse=True):
            if not node.users and node.op == "call_function" and not mutates(node):
                self.graph.erase_node(node)
        for node in made:
            node.meta["by"] = kind
            if getattr(node.target, "namespace", "") == "lumina_kernels":
                *args, ran = node.args
                if ran in ("cpu", "cuda") and not torch.is_grad_enabled():
                    native = getattr(torch.ops.lumina_kernels_cpp, node.target._opname)
                    node.target, node.args = native.default, tuple(args)
        op = (*named, packet(outs[0]).__name__)[0]
        self.fused.append(Site(kind, roots[0].name, op, None, ran))

    def _refusal(self, kind: str, roots: list, read: set, outs: list) -> str | None:
        """Why the results of some nodes that `read` may not take the place of others, if so."""
        for root, out in zip(roots, outs, strict=True):
            if val(root).dtype != val(out).dtype or not same(val(root).shape, val(out).shape):
                return f"would be {val(out).dtype} {tuple(val(out).shape)}"
        if len(roots) > 1 and (read | _above(read, ())) & set(roots):
            return "its inputs need its result"
        above = _above(roots, read)
        inside = {n for n in above if is_tensor(n) and val(n).is_floating_point()}
        smallest = min(val(root).itemsize for root in roots)
        if any(narrows(node) and val(node).itemsize < smallest for node in inside):
            return "rounds to another dtype in between"
        rounds = any(val(n).itemsize < 4 and packet(n) not in MOVES - CASTS for n in inside)
        if self.exact and ("attention" in kind or rounds):
            return "exact=True, and eager rounds more than once"
        if any(min(roots) < write <= n for write in self.writes for n in read):
            return "its inputs come later, beside a write in place"
        writes = [w for w in self.writes if min([*roots, *above]) < w < max(roots)]
        written = {memory(n) for write in writes for n in write.all_input_nodes}
        touched = {memory(n) for n in {*read, *inside, *roots}} - {None}
        return "written to in place" if written & touched else None


def _above(nodes: Iterable[Node], stop: Container[Node]) -> set[Node]:
    """What nodes are computed from, down to `stop`."""
    found, stack = set(), [*nodes]
    while stack:
        more = {n for n in stack.pop().all_input_nodes if n not in stop} - found
        found |= more
        stack += more
    return found


def _lay_out(graph: Graph, before: list) -> None:
    """Give what a graph returns the strides that it had before: a caller may view it."""
    end, results = graph.output_node(), tree_leaves(graph.output_node().args)
    shared = Counter(map(memory, {*results, *graph.find_nodes(op="placeholder")}))
    for node, like in zip(results, before, strict=True):
        dims = [] if like is None else [d for d, n in enumerate(like.shape) if not same(n, 1)]
        if all(same(val(node).stride(d), like.stride(d)) for d in dims):
            continue
        if shared[memory(node)] > 1:
            raise NotImplementedError("a view among the results would have other strides")
        order = sorted(range(like.ndim), key=lambda dim: -like.stride(dim))
        end.replace_input_with(node, insert(end, _in_order, node, order)[0])


def _in_order(x: Tensor, dims: list[int]) -> Tensor:
    """A copy with its dimensions one after the other in memory."""
    dense = x.permute(dims).clone(memory_format=torch.contiguous_format)
    return dense.permute([dims.index(dim) for dim in range(x.ndim)])
