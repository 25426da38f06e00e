"""What a part of a graph computes on random numbers, in float64 whatever it rounds to. Models write
one rotation in a dozen ways: what it computes is compared with the definition of the op."""

import itertools
import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from .graph import CASTS, COPIES, RANDOM, aten, is_cast, is_tensor, packet, val

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
    for many, step in ((tokens, 1), (None, 8)):
        try:
            return _values(root, leaves, many, step)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
            continue  # a size that is another than the number of tokens, or made of it
    return None


def _values(root: Node, leaves: Iterable[Node], many, step: int) -> dict[Node, Tensor]:
    values, known = {}, {}
    fixed = {n for leaf in filter(is_tensor, leaves) for n in val(leaf).shape if type(n) is int}
    primes = (n for n in itertools.count(TOKENS) if all(n % p for p in range(2, n)))
    others = (n * step for n in primes if n * step not in fixed)

    def size(n):
        if isinstance(n, torch.SymInt):  # any number, but none that another size has by chance
            for symbol in sorted(n.node.expr.free_symbols, key=str):
                known[symbol] = known.get(symbol) or next(others)
            return int(n.node.expr.xreplace(known))
        if isinstance(n, (torch.SymFloat, torch.SymBool)):
            raise TypeError("a number that is not known")
        return TOKENS if type(n) is int is type(many) and TOKENS < n == many else n

    def of(node):
        if not isinstance(node, Node):
            return size(node)
        if node not in values:
            if not isinstance(node.meta["val"], (Tensor, tuple, list)):
                values[node] = size(node.meta["val"])
            elif is_cast(node):
                values[node] = of(node.args[0])
            elif packet(node) is aten.detach or RANDOM in getattr(node.target, "tags", ()):
                raise ValueError("more than a value")
            else:
                args, kwargs = map_aggregate((node.args, node.kwargs), of)
                wide = [n for n, x in kwargs.items() if getattr(x, "is_floating_point", 0) is True]
                kwargs = {name: x for name, x in kwargs.items() if name not in wide}
                values[node] = node.target(*args, **kwargs)
        return values[node]

    own = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}  # not the user's
    for node in filter(is_tensor, leaves):
        *rows, channels = val(node).shape or (1,)
        channels = channels if type(channels) is int else size(channels)
        dtype, shape = torch.float64, [*map(size, rows), channels]
        scale = 10 ** (-4 * torch.rand((*shape[:-1], 1), dtype=dtype, **own))  # where bounds act
        dtype = torch.complex128 if val(node).is_complex() else dtype
        values[node] = torch.randn(shape, dtype=dtype, **own) * scale
    of(root)
    return values
