"""Which weights of a block are equal: what is computed with two of them is computed once."""

import itertools

import torch
from torch import Tensor, nn


def equal_parameters(block: nn.Module, inputs: list[Tensor]) -> list[tuple[int, int]]:
    """Pairs of inputs of a graph that are different parameters with equal values: of projections by
    one name in two sublayers, as of two attentions with one query, and of what else is equal
    there."""
    place, pairs = {id(x): i for i, x in enumerate(inputs)}, []
    sublayers = [dict(layer.named_children()) for layer in block.children()]
    for first, second in itertools.combinations(sublayers, 2):
        equal = [pair for n in first for pair in _equal(first[n], second.get(n))]
        # Vectors of ones may be equal by chance.
        if any(p.ndim > 1 and p.min() < p.max() for p, _ in equal):
            pairs += [(place.get(id(p)), place.get(id(q))) for p, q in equal]
    return [pair for pair in pairs if None not in pair]


def _equal(one: nn.Module, other: nn.Module | None) -> list[tuple[Tensor, Tensor]]:
    """The parameters of two layers, if they have some of their own, all equal and on the CPU."""
    a, b = (dict(m.named_parameters(recurse=False)) if m else {} for m in (one, other))
    pairs = [(a[name], b[name]) for name in a] if a.keys() == b.keys() else []
    is_equal = type(one) is type(other) and all(
        type(p) is type(q) is nn.Parameter and p is not q and p.device.type == "cpu"
        and p.shape == q.shape and p.dtype == q.dtype and same_bits(p, q)
        for p, q in pairs
    )  # fmt: skip
    return pairs if is_equal else []


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype, on the CPU, are equal, in words of eight bytes
    where that can be: five times as fast. There is nothing cheaper to ask: their versions do not
    tell of what is written to `.data`, as adapters are merged."""
    if all(x.is_contiguous() and (x.storage_offset() * x.itemsize) % 8 == 0 for x in (a, b)):
        if (a.numel() * a.itemsize) % 8 == 0:
            a, b = (x.detach().flatten().view(torch.int64) for x in (a, b))
    return torch.equal(a, b)
