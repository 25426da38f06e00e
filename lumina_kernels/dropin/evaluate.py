"""What a part of a graph computes, in float64 and whatever it rounds to, on random numbers.

Models write one rotation in a dozen ways. Which one does not matter here: between a projection and
an attention there may be something that is the rotation of `rope_table`, and that is tried.
"""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from lumina_kernels.dropin.graph import aten, is_cast, packet, val
from lumina_kernels.dropin.norms import norm_of

VIEWS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze,
    aten.squeeze, aten.transpose, aten.permute, aten.expand, aten.unbind, aten.chunk, aten.split,
    aten.split_with_sizes, aten.select, aten.slice, aten.contiguous, aten.clone, aten.detach,
    aten.alias, aten.to, aten._to_copy, aten.type_as, aten.expand_as, aten.view_as,
    operator.getitem,
}  # fmt: skip
ARITHMETIC = {
    aten.mul, aten.add, aten.sub, aten.neg, aten.addcmul, aten.stack, aten.cat, aten.complex,
    aten.view_as_complex, aten.view_as_real, aten.real, aten.imag, aten.sum,
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
    if op is aten.cat:  # of tokens: their parts are turned, or all of them
        dim = node.args[1] if len(node.args) > 1 else 0
        return dim % val(node).ndim == val(node).ndim - 1
    return op in VIEWS or op in ARITHMETIC or op is aten.sym_size


def only_views(source: Node, inside: set[Node]) -> list[Node]:
    """The source and what is made of it inside the cone by views and casts."""
    found = [source]
    for node in found:
        for user in node.users:
            if user in inside and packet(user) in VIEWS and user not in found:
                found.append(user)
    return found


def hint(size) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def random_like(node: Node) -> Tensor:
    x = val(node)
    dtype = torch.complex128 if x.is_complex() else torch.float64
    return torch.randn([hint(n) for n in x.shape], dtype=dtype)


def evaluate(root: Node, leaves: dict[Node, Tensor]) -> Tensor:
    """The value of `root` for given values of the leaves of its cone, nothing rounded to less than
    float64."""
    values = dict(leaves)

    def of(node):
        if node in values:
            return values[node]
        if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            values[node] = hint(node.meta["val"])
        elif is_cast(node):
            values[node] = of(node.args[0])
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), of)
            kwargs = {name: x for name, x in kwargs.items() if name != "dtype"}
            values[node] = node.target(*args, **kwargs)
        return values[node]

    return of(root)
