"""What a part of a graph computes, in float64 and whatever it rounds to, on random numbers.

Models write one rotation in a dozen ways. Which one does not matter here: between a projection and
an attention there may be something that is the rotation of `rope_table`, and that is tried.
"""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from lumina_kernels.dropin.graph import CASTS, COPIES, aten, is_cast, is_tensor, packet, val
from lumina_kernels.dropin.rows import norm_of

TOKENS = 13  # enough to tell one rotation from another

VIEWS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze,
    aten.squeeze, aten.transpose, aten.permute, aten.expand, aten.unbind, aten.chunk, aten.split,
    aten.split_with_sizes, aten.select, aten.slice, aten.expand_as, aten.view_as, aten.movedim,
    operator.getitem, *CASTS, *COPIES,
}  # fmt: skip
ARITHMETIC = {
    aten.mul, aten.add, aten.sub, aten.neg, aten.addcmul, aten.stack, aten.cat, aten.complex,
    aten.view_as_complex, aten.view_as_real, aten.real, aten.imag, aten.sum, aten.slice_scatter,
    aten.mul_, aten.add_, aten.roll, aten.concat, aten.empty_like, aten.zeros_like,
}  # fmt: skip


def cone(root: Node, leaves: Iterable[Node] = ()) -> tuple[list[Node], set[Node]]:
    """The nodes that `root` is computed from by views and a rotation's arithmetic, down to the
    `leaves` and to those that are computed otherwise, which come first."""
    found, inside, stack = [], set(), [root]
    while stack:
        node = stack.pop()
        if node in inside or node in found:
            continue
        if node is not root and (node in leaves or not _is_inside(node)):
            found.append(node)
            continue
        inside.add(node)
        stack.extend(node.all_input_nodes)
    return found, inside


def _is_inside(node: Node) -> bool:
    op = packet(node)
    if is_cast(node):
        return True
    if norm_of(node) is not None:
        return False
    if op in (aten.cat, aten.concat, aten.slice_scatter):  # of tokens: their parts are turned
        dim = (*node.args, 0)[1 if op is not aten.slice_scatter else 2]
        return dim % val(node).ndim == val(node).ndim - 1
    return op in VIEWS or op in ARITHMETIC or op is aten.sym_size


def evaluate(root: Node, leaves: Iterable[Node], tokens: int) -> dict[Node, Tensor] | None:
    """Random values of the leaves of a cone, and that of the root for these, nothing rounded to
    less than float64. TOKENS tokens stand for many, where that can be computed."""
    tokens = _hint(tokens)
    for many in (tokens, None) if tokens > TOKENS else (None,):
        try:
            return _values(root, leaves, many)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue  # a size that is another than the number of tokens, or made of it
    return None


def _hint(n):
    """A size as the number that it has now, without a promise that it stays so."""
    return int(n.node.hint) if isinstance(n, torch.SymInt) else n


def _values(root: Node, leaves: Iterable[Node], many: int | None) -> dict[Node, Tensor]:
    def size(n):
        n = _hint(n)
        return TOKENS if type(n) is int and n == many else n

    def of(node):
        if not isinstance(node, Node):
            return size(node)
        if node not in values:
            if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
                values[node] = size(node.meta["val"])
            elif is_cast(node):
                values[node] = of(node.args[0])
            else:
                args, kwargs = map_aggregate((node.args, node.kwargs), of)
                kwargs = {name: x for name, x in kwargs.items() if name != "dtype"}
                values[node] = node.target(*args, **kwargs)
        return values[node]

    values = {}
    for node in filter(is_tensor, leaves):
        dtype = torch.complex128 if val(node).is_complex() else torch.float64
        values[node] = torch.randn([size(n) for n in val(node).shape], dtype=dtype)
    of(root)
    return values
