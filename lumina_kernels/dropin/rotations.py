"""Rotary embeddings of queries and keys, however written, as `rope_table`."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from lumina_kernels import rope_table
from lumina_kernels.dropin.attention import is_swap
from lumina_kernels.dropin.evaluate import cone, evaluate, only_views, random_like
from lumina_kernels.dropin.graph import aten, bare, call, in_dtype, is_tensor, packet, val

TOKENS = 8  # enough to tell one rotation from another
SWAP = ((aten.transpose.int, 1, 2),)

Views = tuple[tuple, ...]  # ATen ops with their further arguments, one after the other


@dataclass(frozen=True)
class Rotation:
    """x, by `heads` a view (B, L, H, K), turned by tables that are views of two nodes."""

    x: Node
    heads: Views
    cos: tuple[Node, Views]
    sin: tuple[Node, Views]
    pairing: str
    channels: int

    @property
    def table(self) -> tuple:
        return self.cos, self.sin, self.pairing, self.channels


def parts(node: Node, heads_second: bool = True) -> Iterator[tuple[Node, bool]]:
    """What may be rotations on the way to an attention's query or key, (B, H, L, K) where
    `heads_second`, else (B, L, H, K): all of it, or each of what is joined along the tokens."""
    inner = bare(node)
    if is_swap(inner):
        yield from parts(inner.args[0], not heads_second)
    elif packet(inner) is aten.cat and val(inner).ndim == 4:
        for part in inner.args[0]:
            yield from parts(part, heads_second)
    else:
        yield node, heads_second


def rotation_of(root: Node, heads_second: bool) -> Rotation | None:
    """What rotation a node of 4 dimensions is, if it is one."""
    if not is_tensor(root) or val(root).ndim != 4:
        return None
    sources, inside = cone(root)
    for source in filter(is_tensor, sources):
        for x in filter(is_tensor, reversed(only_views(source, inside))):
            heads = _heads(root, heads_second, x)
            if x is root or heads is None:
                continue
            tables = [t for t in cone(root, leaves=(x,))[0] if t is not x and is_tensor(t)]
            if tables and not (source in tables and source is not x):
                if found := _by_trial(root, heads_second, x, heads, tables):
                    return found
    return None


def _by_trial(root, heads_second, x, heads, tables) -> Rotation | None:
    """The first reading of the tables with which `rope_table` does what the graph does."""
    values = {node: random_like(node) for node in (x, *tables)}
    try:
        turned = evaluate(root, values)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    out = _apply(SWAP if heads_second else (), turned)[:, :TOKENS]
    q = _apply(heads, values[x])[:, :TOKENS]
    if out.shape != q.shape:
        return None
    full = _apply(heads, val(x)).shape
    for cos, sin in _readings(tables):
        for views in _layouts(_apply(cos[1], val(cos[0])), full):
            cos, sin = ((node, (*first, *views)) for node, first in (cos, sin))
            table = [_some_tokens(_apply(how, values[node])) for node, how in (cos, sin)]
            width = table[0].shape[-1]
            for channels in {width, 2 * width}:
                if channels > q.shape[-1] or channels % 2:
                    continue
                for pairing in ("interleaved", "half"):
                    want, _ = rope_table(q, None, *table, pairing, channels, backend="torch")
                    if torch.allclose(want, out, rtol=1e-9, atol=1e-9):
                        return Rotation(x, heads, cos, sin, pairing, channels)
    return None


def _heads(root: Node, heads_second: bool, x: Node) -> Views | None:
    """How to see x as (B, L, H, K), if it has the numbers of `root`."""
    B, L, H, K = _apply(SWAP if heads_second else (), val(root)).shape
    shape = [str(n) for n in val(x).shape]
    if not val(x).is_floating_point():
        return None
    orders = {True: ([B, H, L, K], SWAP), False: ([B, L, H, K], ())}
    for order in (heads_second, not heads_second):
        if shape == [str(n) for n in orders[order][0]]:
            return orders[order][1]
    if shape == [str(n) for n in (B, L, H * K)] and isinstance(K, int):
        return ((aten.unflatten.int, -1, (-1, K)),)
    return None


def _readings(tables: list[Node]) -> Iterator[tuple]:
    """Pairs of (node, views) that may be cos and sin."""
    pairs = [
        ((a, ()), (b, ()))
        for a in tables
        for b in tables
        if a is not b and val(a).shape == val(b).shape
    ]
    for t in tables:
        if val(t).is_complex():
            real = (aten.view_as_real.default,)
            pairs.append(tuple((t, (real, (aten.select.int, -1, i))) for i in range(2)))
        elif val(t).shape[-2:] == (2, 2):
            pairs.append(((t, ((_diagonal,),)), (t, ((_off_diagonal,),))))
        elif val(t).shape[-1] == 2:
            pairs.append(tuple((t, ((aten.select.int, -1, i),)) for i in range(2)))
    for (cos, first), (sin, second) in pairs:
        half = _apply(first, val(cos)).shape[-1] // 2
        evens, odds = (((aten.slice.Tensor, -1, i, 2 * half, 2),) for i in range(2))
        low, high = (((aten.slice.Tensor, -1, i * half, (i + 1) * half),) for i in range(2))
        for some in (((),), (evens, odds), (low, high)):
            for a, b in itertools.product(some, some):
                yield (cos, (*first, *a)), (sin, (*second, *b))


def _layouts(table: Tensor, heads: torch.Size) -> Iterator[Views]:
    """How to see a table as (L, W), (B, L, W) or (B or 1, L, H, W)."""
    B, L, H, _ = map(str, heads)
    views = []
    for dim in reversed(range(table.ndim - 1)):
        if table.shape[dim] == 1:
            views.append((aten.select.int, dim, 0))
    rest = [str(n) for n in _apply(views, table).shape[:-1]]
    for order, more in (
        ([L], ()),
        ([B, L], ()),
        ([B, L, H], ()),
        ([L, H], ((aten.unsqueeze.default, 0),)),
        ([B, H, L], SWAP),
        ([H, L], ((aten.transpose.int, 0, 1), (aten.unsqueeze.default, 0))),
    ):
        if rest == order:
            yield (*views, *more)


def _some_tokens(table: Tensor) -> Tensor:
    """The first tokens of (L, W), (B, L, W) or (B, L, H, W)."""
    return table[:TOKENS] if table.ndim == 2 else table[:, :TOKENS]


def _apply(views: Views, x: Tensor) -> Tensor:
    for op, *args in views:
        x = op(x, *args)
    return x


def _emit_views(graph: Graph, node: Node, views: Views) -> Node:
    for op, *args in views:
        node = call(graph, op, node, *args)
    return node


def emit(graph: Graph, roots: list[tuple[Node, bool, Rotation]]) -> list[Node]:
    """One call of `rope_table` for one or two rotations by the same table, and what takes the place
    of each."""
    turned = []
    for root, _, r in roots:
        x = in_dtype(graph, r.x, val(root).dtype)
        turned.append(_emit_views(graph, x, r.heads))
    r = roots[0][2]
    cos, sin = (_emit_views(graph, *table) for table in (r.cos, r.sin))
    q, k = (*turned, None)[:2]
    pair = call(graph, rope_table, q, k, cos, sin, r.pairing, r.channels)
    outs = []
    for i, (_, heads_second, _) in enumerate(roots):
        out = call(graph, item, pair, i)
        outs.append(call(graph, aten.transpose.int, out, 1, 2) if heads_second else out)
    return outs


def _diagonal(matrices: Tensor) -> Tensor:
    """(.., 2, 2) as cos of each channel."""
    return matrices.diagonal(0, -2, -1).flatten(-2)


def _off_diagonal(matrices: Tensor) -> Tensor:
    """(.., 2, 2) as sin of each channel, if ((cos, -sin), (sin, cos))."""
    return torch.stack((-matrices[..., 0, 1], matrices[..., 1, 0]), -1).flatten(-2)


def item(pair, i: int):
    return pair[i]
