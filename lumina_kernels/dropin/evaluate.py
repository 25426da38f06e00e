"""What a part of a graph computes on random numbers, in float64 whatever it rounds to. Models write
one rotation in a dozen ways: what it computes is compared with the definition of the op."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from .graph import CASTS, COPIES, aten, is_cast, is_tensor, val

TOKENS = 13  # enough to tell one rotation from another

VIEWS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze,
    aten.squeeze, aten.transpose, aten.permute, aten.expand, aten.unbind, aten.chunk, aten.split,
    aten.split_with_sizes, aten.select, aten.slice, aten.expand_as, aten.view_as, aten.movedim,
    aten.swapaxes, aten.swapdims, aten.narrow, aten.unsafe_chunk, aten.unsafe_split, aten.mT,
    aten.view_as_complex, aten.view_as_real, aten.real, operator.getitem, *CASTS, *COPIES,
}  # fmt: skip
MOVES = {  # exact in every dtype, as are views
    *VIEWS, aten.imag, aten.neg, aten.stack, aten.cat, aten.concat, aten.complex, aten.roll,
    aten.slice_scatter, aten.sym_size, aten.empty_like, aten.zeros_like,
}  # fmt: skip


def evaluate(root: Node, leaves: Iterable[Node], tokens: int) -> dict[Node, Tensor] | None:
    """Random values of the leaves, of which `root` is computed, and its value for these. None if it
    is computed of others, too. TOKENS tokens stand for many, where that can be computed."""
    for many in (tokens, None):
        try:
            return _values(root, leaves, many)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
            continue  # a size that is another than the number of tokens, or made of it
    return None


def _values(root: Node, leaves: Iterable[Node], many) -> dict[Node, Tensor]:
    values = {}

    def hint(n):  # as a number, without a promise that it stays so
        return int(n.node.hint) if isinstance(n, torch.SymInt) else n

    def size(n):
        return TOKENS if type(hint(n)) is int and TOKENS < hint(n) == hint(many) else hint(n)

    def of(node):
        if not isinstance(node, Node):
            return size(node)
        if node not in values:
            if not isinstance(node.meta["val"], (Tensor, tuple, list)):
                values[node] = size(node.meta["val"])
            elif is_cast(node):
                values[node] = of(node.args[0])
            else:
                args, kwargs = map_aggregate((node.args, node.kwargs), of)
                kwargs = {name: x for name, x in kwargs.items() if name != "dtype"}
                values[node] = node.target(*args, **kwargs)
        return values[node]

    own = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}  # not the user's
    for node in filter(is_tensor, leaves):
        *rows, channels = val(node).shape or (1,)
        dtype, shape = torch.float64, [*map(size, rows), hint(channels)]
        scale = 10 ** (-4 * torch.rand((*shape[:-1], 1), dtype=dtype, **own))  # where bounds act
        dtype = torch.complex128 if val(node).is_complex() else dtype
        values[node] = torch.randn(shape, dtype=dtype, **own) * scale
    of(root)
    return values
