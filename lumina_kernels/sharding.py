"""DTensor's rules for the ops, from the letters of their dimensions."""

from typing import Annotated, get_args, get_origin

import torch
from torch import Tensor


def declare(op) -> None:
    """Register how a `KernelOp` may be split: nowhere, or along one of the letters in `op.over`.

    Tensors with that letter are split along it, all others are replicated; a result without it is a
    partial sum. To be called once DTensor is imported, which takes a second.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    def placement(letters, letter, otherwise):
        if letters is None or letter is None:
            return Replicate()
        return Shard(letters[letter][0]) if letter in letters else otherwise

    def rule(*args):
        inputs = dict(zip(op.inputs, args[:-1], strict=True))  # without the backend
        tensors = {name: x for name, x in inputs.items() if hasattr(x, "tensor_meta")}
        given = {name: letters_of(op.inputs[name], x.shape) for name, x in tensors.items()}
        results = op.fake(*(_empty(x) if name in tensors else x for name, x in inputs.items()))
        results = (results,) if isinstance(results, Tensor) else results
        hinted = list(zip(op.outputs.values(), (out.shape for out in results), strict=True))
        produced = [None if shape == (0,) else letters_of(hint, shape) for hint, shape in hinted]

        def split(letter):
            outs = [placement(letters, letter, Partial()) for letters in produced]
            return outs, [
                placement(given[name], letter, Replicate()) if name in given else None
                for name in (*inputs, "backend")
            ]

        ranks = next(iter(tensors.values())).mesh.size()
        single = set().union(*(_single(*each) for each in hinted))
        sizes = {z: {x[z][1] for x in given.values() if z in x} for z in _over(op, given)}
        able = [z for z, found in sizes.items() if z not in single and _fits(found, ranks)]
        return [split(None), *map(split, able)]

    register_sharding(op.overload)(rule)
    # All arguments are part of the key of DTensor's rule cache, because a rule depends on which
    # optional tensors are given.
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[op.overload] = RuntimeSchemaInfo(0, needs_pytree=True)


def letters_of(hint, shape) -> dict[str, tuple[int, int]]:
    """Letter -> dimension and size, without dimensions of size 1, which broadcast."""
    return {z.strip("[]"): (i, size) for z, i, size in _dimensions(hint, shape) if size != 1}


def _single(hint, shape) -> set[str]:
    """Letters of dimensions of size 1 that do not broadcast. A result of one head, say, is no sum
    over heads, so they cannot be split."""
    return {z for z, _, size in _dimensions(hint, shape) if size == 1 and "[" not in z}


def _dimensions(hint, shape) -> list[tuple[str, int, int]]:
    """Letter, dimension and size of each dimension of a tensor annotated with its letters.

    Letters in brackets are of dimensions that may be missing, the last ones first; "..." stands
    for any number of dimensions.
    """
    axes = "" if shape == (0,) else _axes(hint)
    letters = list(map(str, range(len(shape)))) if axes == "..." else axes.split()
    while len(letters) > len(shape):
        letters.remove([z for z in letters if z.startswith("[")][-1])
    return [(z, i, size) for i, (z, size) in enumerate(zip(letters, shape, strict=False))]


def _axes(hint) -> str:
    """What an annotation says of a tensor, "B L D"; "" where it says nothing."""
    if get_origin(hint) is not Annotated:  # optional, or a plain tensor
        hint = next((x for x in get_args(hint) if get_origin(x) is Annotated), None)
    return hint.__metadata__[0] if hint else ""


def _over(op, given) -> list[str]:
    return list(next(iter(given.values()))) if op.over == "..." else op.over.split()


def _fits(sizes: set[int], ranks: int) -> bool:
    """A single size may be split unevenly; query and key/value heads only into equal groups."""
    return len(sizes) == 1 or (len(sizes) > 1 and all(size % ranks == 0 for size in sizes))


def _empty(spec) -> Tensor:
    meta = spec.tensor_meta
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
