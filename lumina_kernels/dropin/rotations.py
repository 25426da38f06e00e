"""Rotary embeddings of queries and keys, however written, as `rope_table`."""

import itertools
import operator
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from lumina_kernels import qk_norm_rope_table, rope_table

from . import graph as g
from .attention import arguments, unrepeated
from .evaluate import MOVES, VIEWS, evaluate
from .graph import aten, packet, val
from .rows import Norm, norm_of

Views = tuple[tuple, ...]  # ATen ops with their further arguments, one after the other
SWAP, FIRST = ((aten.transpose.int, 1, 2),), ((aten.unsqueeze.default, 0),)
FLAT = (aten.flatten.using_ints, -2)
ARITHMETIC = {aten.mul, aten.add, aten.sub, aten.addcmul, aten.sum}


# x, by `heads` seen as (B, L, H, K), turned by a table: (node, views) of cos and of sin, pairing,
# channels. `out` is how the root is seen as (B, L, H, K).
Rotation = namedtuple("Rotation", "root out x heads table")


def rotations(graph: Graph) -> Iterator[tuple]:
    for node in g.live(graph):
        a, found, parts = arguments(node), [], {}
        for operand in (a["query"], a["key"]) if a and val(a["query"]).ndim == 4 else ():
            single = unrepeated(operand)
            parts |= _parts(single, ()) if single else _parts(operand, SWAP)
        for root, out in parts.items():
            if r := _rotation_of(root, out):
                found.append(r)
            elif norm_of(root) is None and aten.mul in map(packet, _cone(root)[1]):
                yield "rotation", [root], _emit, [], []
        while found:
            r = found.pop(0)
            pair = [r, *[other for other in found if other.table == r.table][:1]]
            for rs, is_normed in itertools.product((pair, [r]), (True, False)):
                norms = [norm_of(one.x) for one in rs if is_normed and r.root.users]
                if r.root.users and all(norms):
                    kind = "norm and rotation" if norms else "rotation"
                    yield kind, [one.root for one in rs], _emit, rs, norms
            found = [other for other in found if other.root.users]


def _parts(node: Node, out: Views) -> dict[Node, Views]:
    """What may be rotations on the way to an attention's query or key, and how each is seen as
    (B, L, H, K): all of it, or each of what is joined along the tokens."""
    inner, tokens = g.bare(node), 2 if out else 1
    op, joined = packet(inner), ()
    if op in (aten.cat, aten.concat) and (*inner.args, 0)[1] % val(inner).ndim == tokens:
        joined = inner.args[0]
    elif op is aten.slice_scatter and inner.args[2] % 4 == tokens:
        joined = inner.args[:2]
    elif op is aten.slice and inner.args[1] == tokens:
        joined = inner.args[:1]
    if g.is_swap(inner):
        return _parts(inner.args[0], () if out else SWAP)
    if joined and val(inner).ndim == 4:
        return {root: how for part in joined for root, how in _parts(part, out).items()}
    return {g.unwidened(node): out} if g.is_tensor(node) and val(node).ndim == 4 else {}


def _cone(root: Node, leaves: Iterable[Node] = ()) -> tuple[list[Node], set[Node]]:
    """What is not computed by a rotation's arithmetic, or in `leaves`, above a root; what is."""
    found, inside, stack = [], set(), [root]
    while stack:
        node = stack.pop()
        if node is not root and (node in leaves or not _is_inside(node)):
            found += [node] if node not in found else []
        elif node not in inside:
            inside.add(node)
            stack.extend(node.all_input_nodes)
    return found, inside


def _is_inside(node: Node) -> bool:
    if packet(node) in (aten.cat, aten.concat):  # of tokens: their parts are turned
        return (*node.args, 0)[1] % val(node).ndim == val(node).ndim - 1
    n = norm_of(node) if packet(node) in ARITHMETIC else None
    is_norm = n is not None and not isinstance(n.scale, tuple)  # or cos, taken for a factor
    return packet(node) in MOVES | ARITHMETIC and not is_norm


def _rotation_of(root: Node, out: Views) -> Rotation | None:
    """What rotation a node is, if it is one."""
    sources, inside = _cone(root)
    for source in sources:
        seen = [source]  # and what is made of it by views and casts
        for node in seen:
            seen += [n for n in node.users if n in inside and n not in seen and packet(n) in VIEWS]
        for x in filter(g.is_tensor, seen):
            heads, turned = None if x is root else _heads(root, out, x), [x]
            if heads is None:
                continue
            for node in turned:  # what is computed of x; tables are what it is computed with
                turned += [n for n in node.users if n in inside and n not in turned]
            last = dict.fromkeys(n for node in turned[1:] for n in node.all_input_nodes)
            for tables in (_cone(root, (x,))[0], [n for n in last if n not in turned]):
                tables = [t for t in tables if t is not x and g.is_tensor(t)]
                if tables and (source is x or source not in tables):
                    if table := _by_trial(root, out, x, heads, tables):
                        return Rotation(root, out, x, heads, table)
    return None


def _heads(root: Node, out: Views, x: Node) -> Views | None:
    """How to see x as (B, L, H, K), if it has the numbers of `root`."""
    B, L, H, K = shape = _seen(val(root), out).shape
    flat = {str(K): FIRST, str(H * K): ((aten.unflatten.int, -1, (H, K)),)}
    ways = {4: (out, () if out else SWAP), 3: (flat.get(str(val(x).shape[-1]), ()),)}
    fits = (how for how in ways.get(val(x).ndim, ()) if g.same(_seen(val(x), how).shape, shape))
    return next(fits, None) if val(x).is_floating_point() else None


def _by_trial(root: Node, out: Views, x: Node, heads: Views, tables: list[Node]) -> tuple | None:
    """The first reading of the tables with which `rope_table` does what the graph does."""
    full = _seen(val(x), heads)
    values = evaluate(root, (x, *tables), full.shape[1])
    if values is None:
        return None
    turned, q = _seen(values[root], out), _seen(values[x], heads)
    for cos, sin in _readings(tables, *full.shape[2:]):
        for views in _layouts(_seen(val(cos[0]), cos[1]), full):
            pair = [(node, (*first, *views)) for node, first in (cos, sin)]
            entries = [_seen(values[node], how) for node, how in pair]
            widths = {entries[0].shape[-1], 2 * entries[0].shape[-1]}
            for channels, pairing in itertools.product(widths, ("interleaved", "half")):
                if channels % 2 == q.shape[-1] % 2 == 0 < channels <= q.shape[-1]:
                    want, _ = rope_table(q, None, *entries, pairing, channels, backend="torch")
                    if torch.allclose(want, turned, rtol=1e-9, atol=1e-9):
                        return *pair, pairing, channels
    return None


def _readings(tables: list[Node], H: int, K: int) -> Iterator[tuple]:
    """Pairs of (node, views) that may be cos and sin."""

    def slices(width, step):
        """The even and the odd entries, or with step=1 the lower and the upper half."""
        half = width // 2
        starts = [(i, 2 * half, 2) if step == 2 else (i * half, (i + 1) * half) for i in range(2)]
        return [((aten.slice.Tensor, -1, *start),) for start in starts]

    pairs = []
    for a, b in itertools.product(tables, repeat=2):
        is_flat = val(a).shape[-1] in (H * K, H * K // 2) and H > 1
        per_head = [((aten.unflatten.int, -1, (H, -1)),)] * is_flat
        if g.same(val(a).shape, val(b).shape) and not val(a).is_complex():
            pairs += [((a, views), (b, views)) for views in ((), *per_head)]
    for t in tables:
        ways = slices(val(t).shape[-1], 1)
        if val(t).is_complex():
            ways = [((aten.view_as_real.default,), (aten.select.int, -1, i)) for i in range(2)]
        elif val(t).shape[-2:] == (2, 2):
            ways = [((aten.diagonal.default, 0, -2, -1), FLAT), ((_off_diagonal,),)]
        elif val(t).shape[-1] == 2:
            ways = [((aten.select.int, -1, i),) for i in range(2)]
        pairs.append(tuple((t, way) for way in ways))
    for (cos, first), (sin, second) in pairs:
        width = _seen(val(cos), first).shape[-1]
        for some in ([()], slices(width, 2), slices(width, 1)):
            for a, b in itertools.product(some, some):
                yield (cos, (*first, *a)), (sin, (*second, *b))


def _layouts(table: Tensor, heads: Tensor) -> Iterator[Views]:
    """How to see a table as (L, W), (B, L, W) or (B or 1, L, H, W)."""
    B, L, H, _ = heads.shape
    ones = [dim for dim in reversed(range(table.ndim - 1)) if table.shape[dim] == 1]
    drop = [(aten.select.int, dim, 0) for dim in ones]
    for order, more in (
        ((L,), ()), ((B, L), ()), ((B, L, H), ()), ((L, H), FIRST), ((B, H, L), SWAP),
        ((H, L), ((aten.transpose.int, 0, 1), *FIRST)),
    ):  # fmt: skip
        if g.same(order, _seen(table, drop).shape[:-1]):
            yield *drop, *more


def _seen(x, views: Views, call: Callable = lambda op, *args: op(*args)):
    for op, *args in views:
        x = call(op, x, *args)
    return x


def _emit(call: g.Calls, pair: list[Rotation], norms: list[Norm]) -> list[Node]:
    """What takes the place of one or two rotations by the same table, maybe after norms."""
    if not pair:
        raise NotImplementedError("no tables of which it is the rotation")
    sources, xs = [n.x for n in norms] or [r.x for r in pair], []
    for x, r in zip(sources, pair, strict=True):
        xs += [_seen(g.in_dtype(call, x, val(r.root).dtype), r.heads, call)]
    cos, sin, *how = pair[0].table
    table = _seen(*cos, call), _seen(*sin, call), *how
    if norms:
        across = val(sources[0]).shape[-1] != val(xs[0]).shape[-1]
        (kind, eps, modulated), *others = {(n.kind, n.eps, n.scale or n.shift) for n in norms}
        if others or modulated:
            raise NotImplementedError("norms of different kinds")
        terms = [p and call(FLAT[0], p) for n in norms for p in (n.weight, n.bias)]
        last = *table, eps, f"{kind}_{'across_heads' if across else 'per_head'}"
        turned = call(qk_norm_rope_table, *(*xs, None)[:2], *(*terms, None, None)[:4], *last)
    else:
        turned = call(rope_table, *(*xs, None)[:2], *table)
    return [_seen(call(operator.getitem, turned, i), r.out, call) for i, r in enumerate(pair)]


def _off_diagonal(matrices: Tensor) -> Tensor:
    """((cos, -sin), (sin, cos)) as sin of each channel; the diagonal is cos."""
    return torch.stack((-matrices[..., 0, 1], matrices[..., 1, 0]), -1).flatten(-2)
