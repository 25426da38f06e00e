"""The pass: captures a graph in whole ATen ops, cleans it, and puts ops in place of its parts."""

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor
from torch._guards import detect_fake_mode, tracing
from torch._ops import HigherOrderOperator
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from lumina_kernels.patch_report import Site, left

from . import graph as g
from .attention import attentions, rotations
from .graph import aten, insert, is_tensor, memory, packet, same, val
from .rows import activations, norms, residuals

# What Dynamo calls to change the mode of what comes after.
SWITCHES = "_set_grad_enabled", "_enter_autocast", "_exit_autocast"
# Where the functions are that make a gradient another one than that of what is computed.
CUSTOM = re.compile(r"torch\.(_C|_C\._autograd|_C\._functorch|_functorch\..*|autograd\..*|amp\..*)")
OTHERS = "requires_grad_", "register_hook", "retain_grad", "as_strided"
NEW = {aten.div, aten.clone, aten._to_copy}  # with no kwargs, as how to round, and by 1: a copy
AROUND = "which around whole blocks does no harm"


def capture(gm: GraphModule) -> GraphModule:
    """The same in ATen ops as autograd sees them: linear, layer_norm, attention are still one node
    each. The inputs have their fake values in meta["val"], of which `renew` makes all others."""
    inputs = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    with tracing(None):  # not the fresh mode that Dynamo has for backends
        if (mode := detect_fake_mode(inputs)) is None:
            raise NotImplementedError("no tensor comes in")
        with mode:
            whole = make_fx(_InOneMode(gm).run, pre_dispatch=True)(*inputs)
    for node, x in zip(whole.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = x  # not detached
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
    g.renew(graph)
    known = {memory(n) for w in graph.nodes if mutates(w) for n in w.all_input_nodes}
    known |= {memory(n) for n in graph.output_node().all_input_nodes}
    for node in list(graph.nodes):
        if _is_idle(node, known):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _without_writes(graph)
    graph.eliminate_dead_code(lambda node: node.is_impure() or mutates(node))
    returned = {memory(n) for n in graph.output_node().all_input_nodes}
    seen = {}
    for node in list(graph.nodes) if not any(map(mutates, graph.nodes)) else ():
        if is_tensor(node) and g.RANDOM not in getattr(node.target, "tags", ()):
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node and not {memory(first), memory(node)} <= returned:
                returned |= {memory(first)} if memory(node) in returned else set()
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def mutates(node: Node) -> bool:
    """Whether a node writes to a tensor, or does something else that its place decides about."""
    if packet(node) in (aten.batch_norm, aten.instance_norm):  # no schema says so
        return bool(node.args[5]) and node.args[3] is not None
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema.is_mutable if schema else node.is_impure())


def _is_idle(node: Node, known: set) -> bool:
    """Whether an inner node returns what it was given, or a copy of it if neither is `known`."""
    x, is_result = node.args[0] if node.args else None, any(n.op == "output" for n in node.users)
    if not is_tensor(x) or not is_tensor(node) or is_result:
        return False
    if packet(node) is aten.dropout:
        return not node.args[2] or node.args[1] == 0
    if packet(node) is aten.detach:
        return not torch.is_grad_enabled()
    is_copy = any(given is True for given in (*node.args[2:], *node.kwargs.values()))
    may_be = packet(node) in g.VIEWS and not is_copy
    if packet(node) in NEW:
        is_known = {memory(x), memory(node)} & known
        may_be = node.args[1:] in ((), (1,)) and not node.kwargs and not is_known
    return may_be and same(g.layout(val(x)), g.layout(val(node)))


def _without_writes(graph: Graph) -> None:
    """`base[i:j] = value` as a new tensor, where nobody reads `base` in between or by another name
    later: nothing may move past a write, and some models turn their queries so."""
    for base in filter(is_tensor, list(graph.nodes)):
        place = {node: i for i, node in enumerate(graph.nodes)}
        writes = sorted((w for view in base.users if (w := _write_to(view))), key=place.get)
        if not writes or not _is_private(place, base, writes):
            continue
        whole = base
        for write in writes:
            view, *values = write.args
            arguments = write.target, whole, view.args[1:], values, write.kwargs
            whole, _ = insert(write, functionalize(_written), *arguments)
            graph.erase_node(write)
            graph.erase_node(view)
        for user in [n for n in base.users if place.get(n, -1) > place[writes[-1]]]:
            user.replace_input_with(base, whole)
        g.renew(graph)


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
    schema, tags = write.target._schema, {*write.target.tags}
    is_first = [x.name for x in schema.arguments if x.is_write] == [schema.arguments[0].name]
    fits = is_first and schema.name.startswith("aten::")
    fits &= not tags & {g.RANDOM, torch.Tag.inplace_view}
    return write if fits and write.args[0] is view not in write.args[1:] else None


def _is_private(place: dict[Node, int], base: Node, writes: list[Node]) -> bool:
    """Whether what is written is read by users of `base` alone, and after the last write."""
    first, last, views = place[writes[0]], place[writes[-1]], {write.args[0] for write in writes}
    names = [n for n in place if n not in views and place[n] <= last and memory(n) == memory(base)]
    return all(node.op == "call_function" for node in names) and not any(
        place[user] > first and user not in views and not (node is base and place[user] > last)
        for node in names for user in node.users
    )  # fmt: skip


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

        def call(op, *args):
            named.append(op.__name__)
            return op(*args, backend=self.backend)

        def emitted(*args):
            outs = emit(call, *args)
            outs = [outs] if isinstance(outs, Tensor) else outs
            return [
                x.to(t) if g.holds(x.dtype, t) else x for x, t in zip(outs, dtypes, strict=True)
            ]

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
        if self.writes:
            g.renew(self.graph)
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
        if any(g.narrows(node) and val(node).itemsize < smallest for node in inside):
            return "rounds to another dtype in between"
        rounds = any(val(n).itemsize < 4 and packet(n) not in g.MOVES - g.CASTS for n in inside)
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
    for node, like in dict(zip(results, before, strict=True)).items():
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
