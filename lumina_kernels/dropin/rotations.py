"""Rotary embeddings of queries and keys, however written, as `rope_table`."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from lumina_kernels import rope_table
from lumina_kernels.dropin.attention import arguments
from lumina_kernels.dropin.evaluate import TOKENS, VIEWS, cone, evaluate
from lumina_kernels.dropin.graph import (
    Calls,
    Match,
    aten,
    bare,
    in_dtype,
    is_swap,
    is_tensor,
    item,
    packet,
    same,
    val,
)
from lumina_kernels.dropin.rows import norm_of

Views = tuple[tuple, ...]  # ATen ops with their further arguments, one after the other
SWAP = ((aten.transpose.int, 1, 2),)


@dataclass(frozen=True)
class Rotation:
    """x, by `heads` a view (B, L, H, K), turned by tables that are views of two nodes."""

    root: Node
    out: Views  # how the root is seen as (B, L, H, K)
    x: Node
    heads: Views
    table: tuple  # (node, views) of cos and of sin, pairing, channels


def rotations(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        a = arguments(node)
        parts = [part for name in ("query", "key") for part in _parts(a[name], SWAP)] if a else []
        found = []
        for root, out in dict(parts).items():
            if r := _rotation_of(root, out):
                found.append(r)
            elif norm_of(root) is None and aten.mul in map(packet, cone(root)[1]):
                yield Match("rotation", [root], _unknown)
        while found:
            r = found.pop(0)
            partner = next((other for other in found if other.table == r.table), None)
            if partner is None:
                yield _match(r)
            else:
                found.remove(partner)
                yield _match(r, partner)
                yield from (_match(one) for one in (r, partner) if one.root.users)


def _match(*pair: Rotation) -> Match:
    return Match("rotation", [r.root for r in pair], lambda call: _emit(call, pair))


def _unknown(call: Calls) -> None:
    raise NotImplementedError("no tables of which it is the rotation")


def _parts(node: Node, out: Views) -> Iterator[tuple[Node, Views]]:
    """What may be rotations on the way to an attention's query or key, and how each is seen as
    (B, L, H, K): all of it, or each of what is joined along the tokens."""
    inner = bare(node)
    if is_swap(inner):
        yield from _parts(inner.args[0], () if out else SWAP)
    elif packet(inner) in (aten.cat, aten.concat) and val(inner).ndim == 4:
        for part in inner.args[0]:
            yield from _parts(part, out)
    elif packet(inner) is aten.slice_scatter and inner.args[2] % 4 == (2 if out else 1):
        for part in inner.args[:2]:
            yield from _parts(part, out)
    elif is_tensor(node) and val(node).ndim == 4:
        yield node, out


def _rotation_of(root: Node, out: Views) -> Rotation | None:
    """What rotation a node is, if it is one."""
    sources, inside = cone(root)
    for source in filter(is_tensor, sources):
        for x in reversed(_only_views(source, inside)):
            heads = _heads(root, out, x)
            if x is root or heads is None:
                continue
            tables = [t for t in cone(root, leaves=(x,))[0] if t is not x and is_tensor(t)]
            if tables and (source is x or source not in tables):
                if table := _by_trial(root, out, x, heads, tables):
                    return Rotation(root, out, x, heads, table)
    return None


def _only_views(source: Node, inside: set[Node]) -> list[Node]:
    """The source and what is made of it inside the cone by views and casts."""
    found = [source]
    for node in found:
        for user in node.users:
            if user in inside and packet(user) in VIEWS and user not in found:
                found.append(user)
    return list(filter(is_tensor, found))


def _heads(root: Node, out: Views, x: Node) -> Views | None:
    """How to see x as (B, L, H, K), if it has the numbers of `root`."""
    B, L, H, K = _seen(val(root), out).shape
    if not val(x).is_floating_point():
        return None
    for views in (out, () if out else SWAP):
        if val(x).ndim == 4 and same(_seen(val(x), views).shape, (B, L, H, K)):
            return views
    flat = isinstance(K, int) and same(tuple(val(x).shape), (B, L, H * K))
    return ((aten.unflatten.int, -1, (-1, K)),) if flat else None


def _by_trial(root: Node, out: Views, x: Node, heads: Views, tables: list[Node]) -> tuple | None:
    """The first reading of the tables with which `rope_table` does what the graph does."""
    full = _seen(val(x), heads)
    values = evaluate(root, (x, *tables), full.shape[1])
    if values is None:
        return None
    turned, q = (_seen(values[node], how)[:, :TOKENS] for node, how in ((root, out), (x, heads)))
    if turned.shape != q.shape:
        return None
    for cos, sin in _readings(tables):
        for views in _layouts(_seen(val(cos[0]), cos[1]), full):
            pair = [(node, (*first, *views)) for node, first in (cos, sin)]
            entries = [_some_tokens(_seen(values[node], how)) for node, how in pair]
            width = entries[0].shape[-1]
            for channels, pairing in itertools.product({width, 2 * width}, ("interleaved", "half")):
                if channels <= q.shape[-1] and channels % 2 == 0:
                    want, _ = rope_table(q, None, *entries, pairing, channels, backend="torch")
                    if torch.allclose(want, turned, rtol=1e-9, atol=1e-9):
                        return *pair, pairing, channels
    return None


def _readings(tables: list[Node]) -> Iterator[tuple]:
    """Pairs of (node, views) that may be cos and sin."""
    pairs = [
        ((a, ()), (b, ()))
        for a, b in itertools.permutations(tables, 2)
        if same(val(a).shape, val(b).shape)
    ]
    for t in tables:
        last = [((aten.select.int, -1, i),) for i in range(2)]
        if val(t).is_complex():
            pairs.append(tuple((t, ((aten.view_as_real.default,), *i)) for i in last))
        elif val(t).shape[-2:] == (2, 2):
            pairs.append(((t, ((_diagonal,),)), (t, ((_off_diagonal,),))))
        elif val(t).shape[-1] == 2:
            pairs.append(tuple((t, i) for i in last))
    for (cos, first), (sin, second) in pairs:
        half = _seen(val(cos), first).shape[-1] // 2
        evens_odds = [((aten.slice.Tensor, -1, i, 2 * half, 2),) for i in range(2)]
        low_high = [((aten.slice.Tensor, -1, i * half, (i + 1) * half),) for i in range(2)]
        for some in ([()], evens_odds, low_high):
            for a, b in itertools.product(some, some):
                yield (cos, (*first, *a)), (sin, (*second, *b))


def _layouts(table: Tensor, heads: Tensor) -> Iterator[Views]:
    """How to see a table as (L, W), (B, L, W) or (B or 1, L, H, W)."""
    B, L, H, _ = heads.shape
    ones = [dim for dim in reversed(range(table.ndim - 1)) if table.shape[dim] == 1]
    drop = tuple((aten.select.int, dim, 0) for dim in ones)
    rest = tuple(_seen(table, drop).shape[:-1])
    first = (aten.unsqueeze.default, 0)
    for order, more in (
        ((L,), ()), ((B, L), ()), ((B, L, H), ()), ((L, H), (first,)), ((B, H, L), SWAP),
        ((H, L), ((aten.transpose.int, 0, 1), first)),
    ):  # fmt: skip
        if same(order, rest):
            yield *drop, *more


def _some_tokens(table: Tensor) -> Tensor:
    """The first tokens of (L, W), (B, L, W) or (B, L, H, W)."""
    return table[:TOKENS] if table.ndim == 2 else table[:, :TOKENS]


def _seen(x: Tensor, views: Views) -> Tensor:
    for op, *args in views:
        x = op(x, *args)
    return x


def _emit_views(call: Calls, node: Node, views: Views) -> Node:
    for op, *args in views:
        node = call(op, node, *args)
    return node


def _emit(call: Calls, pair: tuple[Rotation, ...]) -> list[Node]:
    """One call of `rope_table` for one or two rotations by the same table, and what takes the place
    of each."""
    dtypes = [val(r.root).dtype for r in pair]
    xs = [in_dtype(call, r.x, dtype) for r, dtype in zip(pair, dtypes, strict=True)]
    q, k = [_emit_views(call, x, r.heads) for x, r in zip(xs, pair, strict=True)], None
    cos, sin, *rest = pair[0].table
    tables = (_emit_views(call, *table) for table in (cos, sin))
    turned = call(rope_table, *(*q, None)[:2], *tables, *rest)
    outs = [call(item, turned, i) for i in range(len(pair))]
    return [_emit_views(call, out, r.out) for out, r in zip(outs, pair, strict=True)]


def _diagonal(matrices: Tensor) -> Tensor:
    """(.., 2, 2) as cos of each channel."""
    return matrices.diagonal(0, -2, -1).flatten(-2)


def _off_diagonal(matrices: Tensor) -> Tensor:
    """(.., 2, 2) as sin of each channel, if ((cos, -sin), (sin, cos))."""
    return torch.stack((-matrices[..., 0, 1], matrices[..., 1, 0]), -1).flatten(-2)
