"""Attentions with their masks and repeated heads, and rotations of their queries and keys."""

import itertools
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from lumina_kernels import gqa_attention, qk_norm_rope_table, rope_table
from lumina_kernels.attention_masks import key_mask_and_bias

from . import graph as g
from .graph import MOVES, VIEWS, aten, evaluate, packet, val
from .rows import Norm, flat, norm_of

Views = tuple[tuple, ...]  # functions with their further arguments, one after the other
SWAP, FIRST = ((torch.transpose, 1, 2),), ((torch.unsqueeze, 0),)
REPEATS = {*VIEWS, aten.repeat, aten.repeat_interleave}
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
ARITHMETIC = {aten.mul, aten.add, aten.sub, aten.addcmul, aten.sum}

# x, by `heads` seen as (B, L, H, K), turned by a table: (node, views) of cos and of sin, pairing,
# channels. `out` is how the root is seen as (B, L, H, K).
Rotation = namedtuple("Rotation", "root out x heads table")


def arguments(node) -> dict | None:
    """The arguments of an attention by name, or None."""
    if packet(node) is not aten.scaled_dot_product_attention:
        return None
    given = dict(zip(NAMES, node.args, strict=False), **node.kwargs)
    return dict.fromkeys((*NAMES, "scale")) | given


def seen(x: Tensor, views: Views) -> Tensor:
    for op, *args in views:
        x = op(x, *args)
    return x


def attentions(graph: Graph) -> Iterator[tuple]:
    for node in g.live(graph):
        if found := _gated_text_of(node):
            yield "attention and text", [node], _attend, *found
    for node in g.live(graph):
        if arguments(node):
            yield "attention", [node], _attend, _tokens_first(node)


def _attend(call: Callable, image: dict, text: dict | None = None, gate: Tensor | None = None):
    """`gqa_attention` as (B, H, L, K), or (B, L, H, K) with a text branch."""
    for name in ("dropout_p", "is_causal"):
        if image[name] or text and text[name]:
            raise NotImplementedError(f"{name}={image[name] or text[name]}")
    if any(image[name][0].ndim != 4 for name in NAMES[:3]):
        raise NotImplementedError("not (B, H, L, K)")
    if image["narrows"] and not torch.is_autocast_enabled(image["query"][0].device.type):
        raise NotImplementedError("in fewer bits than the model, whose rounding would be another")
    q, k, v = (seen(*image[name]) for name in NAMES[:3])
    (key_mask, bias), K, branch = _masks(image["attn_mask"], q), q.shape[-1], (None,) * 4
    if text:
        text_mask, text_bias = _masks(text["attn_mask"], q)
        if text_bias is not None or abs((text["scale"] or K**-0.5) * K**0.5 - 1) > 1e-6:
            raise NotImplementedError("the text has a bias, or another scale")
        branch = *(seen(*text[name]) for name in NAMES[1:3]), text_mask, gate
    out = call(gqa_attention, q, k, v, key_mask, image["scale"], *branch, bias)
    return out if text else out.transpose(1, 2)


def _gated_text_of(node) -> tuple[dict, dict, Node] | None:
    """image, text and gate of image + tanh(gate) * text: two attentions of the same queries."""
    for image, term in g.operands(node, aten.add):
        for text, gate in g.operands(g.bare(term), aten.mul):
            both = [g.bare(x.args[0]) for x in map(g.bare, (image, text)) if g.is_swap(x)]
            a, b = map(arguments, both) if len(both) == 2 else (None, None)
            if a and b and a["query"] is b["query"] and g.is_tensor(gate):
                heads = val(a["query"]).shape[1]
                is_column = list(val(gate).shape[-2:]) == [heads, 1] == [val(gate).numel(), 1]
                while packet(gate) in VIEWS - g.CASTS or g.is_cast(gate):
                    gate = gate.args[0]
                    is_column &= g.is_tensor(gate) and val(gate).numel() == heads
                x = g.bare(gate.args[0]) if packet(gate) is aten.tanh else None
                if is_column and x and list(val(x).shape) == [heads]:
                    return *map(_tokens_first, both), x
    return None


def _tokens_first(node: Node) -> dict:
    """The arguments of an attention: its query, keys and values as nodes and how to see them as
    (B, L, H, K), without a second transposition, before heads were repeated for groups."""
    a = arguments(node)
    a["narrows"], single = g.narrows(a["value"]), [unrepeated(a[name]) for name in NAMES[1:3]]
    is_single = all(single) and val(single[0]).shape[2] == val(single[1]).shape[2]
    for name, source in zip(NAMES, (None, *single) if is_single else (None,) * 3, strict=False):
        x = a[name]
        a[name] = (source, ()) if source else (x.args[0], ()) if g.is_swap(x) else (x, SWAP)
    return a


def unrepeated(node: Node) -> Node | None:
    """(B, L, G, K) that repeated heads (B, H, L, K) were made of, G < H."""
    source, (_, H, L, _) = node, (*val(node).shape, 0, 0, 0)[:4]
    while packet(source) in REPEATS and val(node).ndim == 4:
        source = source.args[0]
        G = val(source).shape[2] if g.is_tensor(source) and val(source).ndim == 4 else H
        if isinstance(G, int) and G < H and H % G == 0 and (v := evaluate(node, [source], L)):
            if torch.equal(v[node], v[source].repeat_interleave(H // G, 2).transpose(1, 2)):
                return source
    return None


def _masks(mask: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """key_mask, or bias, for an attn_mask that broadcasts to (B, H, L, L_kv)."""
    if mask is None:
        return None, None
    mask = mask[(None,) * (4 - mask.ndim)]
    for dim in (1, 2):  # what is expanded counts as one
        mask = mask[(slice(None),) * dim + (slice(1),)] if mask.stride(dim) == 0 else mask
    return key_mask_and_bias(mask, q)


def rotations(graph: Graph) -> Iterator[tuple]:
    for node in g.live(graph):
        a, parts = arguments(node), {}
        for operand in (a["query"], a["key"]) if a and val(a["query"]).ndim == 4 else ():
            single = unrepeated(operand)
            parts |= _parts(single, ()) if single else _parts(operand, SWAP)
        found = {root: _rotation_of(root, out) for root, out in parts.items()}
        for root, r in found.items():
            if r is None and norm_of(root) is None and aten.mul in map(packet, _cone(root)[1]):
                yield "rotation", [root], _turn, [root], [], []
        for r in filter(None, found.values()):
            same = [other for other in found.values() if other and other.table == r.table]
            pair = [r, *[other for other in same[same.index(r) + 1 :] if other.root.users][:1]]
            for rs, is_normed in itertools.product((pair, [r]), (True, False)):
                norms = [norm_of(one.x) for one in rs if is_normed and r.root.users]
                if r.root.users and all(norms):
                    of = zip(norms or rs, rs, strict=True)
                    xs = [g.behind(n.x, val(one.root).dtype) for n, one in of]
                    kind = "norm and " * bool(norms) + "rotation"
                    yield kind, [one.root for one in rs], _turn, xs, rs, norms


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
    found, inside = {}, [root]
    for node in inside:
        for n in node.all_input_nodes:
            if n in leaves or n not in inside and not _is_inside(n):
                found[n] = None
            elif n not in inside:
                inside.append(n)
    return [*found], {*inside}


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
        forms = [source]  # and what is made of it by views and casts
        for node in forms:
            more = [n for n in node.users if n in inside and packet(n) in VIEWS]
            forms += [n for n in more if n not in forms]
        for x in filter(g.is_tensor, forms):
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
    B, L, H, K = shape = seen(val(root), out).shape
    threes = {str(K): FIRST, str(H * K): ((torch.unflatten, -1, (H, K)),)}
    ways = {4: (out, () if out else SWAP), 3: (threes.get(str(val(x).shape[-1]), ()),)}
    fits = (how for how in ways.get(val(x).ndim, ()) if g.same(seen(val(x), how).shape, shape))
    return next(fits, None) if val(x).is_floating_point() else None


def _by_trial(root: Node, out: Views, x: Node, heads: Views, tables: list[Node]) -> tuple | None:
    """The first reading of the tables with which `rope_table` does what the graph does."""
    full = seen(val(x), heads)
    if (values := evaluate(root, (x, *tables), full.shape[1])) is None:
        return None
    turned, q = seen(values[root], out), seen(values[x], heads)
    for cos, sin in _readings(tables, *full.shape[2:]):
        for views in _layouts(seen(val(cos[0]), cos[1]), full):
            pair = [(node, (*first, *views)) for node, first in (cos, sin)]
            entries = [seen(values[node], how) for node, how in pair]
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
        return [((aten.slice, -1, *start),) for start in starts]

    pairs = []
    for a, b in itertools.product(tables, repeat=2):
        is_flat = val(a).shape[-1] in (H * K, H * K // 2) and H > 1
        per_head = [((torch.unflatten, -1, (H, -1)),)] * is_flat
        if g.same(val(a).shape, val(b).shape) and not val(a).is_complex():
            pairs += [((a, views), (b, views)) for views in ((), *per_head)]
    for t in tables:
        ways = slices(val(t).shape[-1], 1)
        if val(t).is_complex():
            ways = [((torch.view_as_real,), (torch.select, -1, i)) for i in range(2)]
        elif val(t).shape[-2:] == (2, 2):
            ways = [((torch.diagonal, 0, -2, -1), (torch.flatten, -2)), ((_off_diagonal,),)]
        elif val(t).shape[-1] == 2:
            ways = [((torch.select, -1, i),) for i in range(2)]
        pairs.append(tuple((t, way) for way in ways))
    for (cos, first), (sin, second) in pairs:
        width = seen(val(cos), first).shape[-1]
        for some in ([()], slices(width, 2), slices(width, 1)):
            for a, b in itertools.product(some, some):
                yield (cos, (*first, *a)), (sin, (*second, *b))


def _layouts(table: Tensor, heads: Tensor) -> Iterator[Views]:
    """How to see a table as (L, W), (B, L, W) or (B or 1, L, H, W)."""
    B, L, H, _ = heads.shape
    ones = [dim for dim in reversed(range(table.ndim - 1)) if table.shape[dim] == 1]
    drop = [(torch.select, dim, 0) for dim in ones]
    for order, more in (
        ((L,), ()), ((B, L), ()), ((B, L, H), ()), ((L, H), FIRST), ((B, H, L), SWAP),
        ((H, L), ((torch.transpose, 0, 1), *FIRST)),
    ):  # fmt: skip
        if g.same(order, seen(table, drop).shape[:-1]):
            yield *drop, *more


def _turn(call: Callable, xs: list[Tensor], pair: list[Rotation], norms: list[Norm]):
    """What takes the place of one or two rotations by the same table, maybe after norms."""
    if not pair:
        raise NotImplementedError("no tables of which it is the rotation")
    xs = [g.widened(x, pair[0].root.dtype) for x in xs]
    heads = [seen(x, r.heads) for x, r in zip(xs, pair, strict=True)]
    (cos, sin, *how), across = pair[0].table, xs[0].shape[-1] != heads[0].shape[-1]
    table, both = (seen(*cos), seen(*sin), *how), (*heads, None)[:2]
    if norms:
        if len({(n.kind, n.eps) for n in norms}) > 1 or any(n.scale or n.shift for n in norms):
            raise NotImplementedError("norms of different kinds")
        terms = [flat(p) for n in norms for p in (n.weight, n.bias)]
        last = *table, norms[0].eps, f"{norms[0].kind}_{'across_heads' if across else 'per_head'}"
        turned = call(qk_norm_rope_table, *both, *(*terms, None, None)[:4], *last)
    else:
        turned = call(rope_table, *both, *table)
    return [seen(x, r.out) for x, r in zip(turned, pair, strict=False)]


def _off_diagonal(matrices: Tensor) -> Tensor:
    """((cos, -sin), (sin, cos)) as sin of each channel; the diagonal is cos."""
    return torch.stack((-matrices[..., 0, 1], matrices[..., 1, 0]), -1).flatten(-2)
