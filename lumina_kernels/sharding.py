"""DTensor's rules for the ops, from the letters of their dimensions. Imported with DTensor."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from lumina_kernels.kernel_op import KernelOp, axes_of


def declare(op: KernelOp) -> None:
    """Register how `op` may be split: nowhere, or along one of the letters in `op.over`.

    A tensor with that letter is split there, the others are whole on every rank; a result without
    it is a sum over the ranks.
    """

    def rule(*args):
        inputs = dict(zip(op.inputs, args[:-1], strict=True))  # without the backend
        tensors = {name: x for name, x in inputs.items() if hasattr(x, "tensor_meta")}
        given = {name: _letters(op.inputs[name], x.shape) for name, x in tensors.items()}
        results = op.fake(*(_empty(x) if name in tensors else x for name, x in inputs.items()))
        results = (results,) if isinstance(results, Tensor) else results
        produced = [
            None if out.shape == (0,) else _letters(hint, out.shape)  # None: it is absent
            for hint, out in zip(op.outputs.values(), results, strict=True)
        ]

        def split(letter):
            outs = [_placement(letters, letter, Partial()) for letters in produced]
            return outs, [
                _placement(given[name], letter, Replicate()) if name in given else None
                for name in (*inputs, "backend")
            ]

        ranks = next(iter(tensors.values())).mesh.size()
        sizes = {z: {x[z][1] for x in given.values() if z in x} for z in _over(op, given)}
        whole = split(None)
        return [whole, *(split(z) for z, found in sizes.items() if _fits(found, ranks))]

    register_sharding(op.overload)(rule)
    # Every argument takes part in the key under which DTensor keeps what a rule said, as it differs
    # with the optional tensors that are there.
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[op.overload] = RuntimeSchemaInfo(0, needs_pytree=True)


def _letters(hint, shape) -> dict[str, tuple[int, int]]:
    """Letter -> dimension and size, without dimensions of size 1, which broadcast.

    Letters in brackets are of dimensions that may be missing, the first ones first; "..." stands
    for any number of dimensions.
    """
    axes = "" if shape == (0,) else axes_of(hint)
    letters = list(map(str, range(len(shape)))) if axes == "..." else (axes or "").split()
    while len(letters) > len(shape):
        letters.remove(next(z for z in letters if z.startswith("[")))
    found = enumerate(zip(letters, shape, strict=False))
    return {z.strip("[]"): (i, size) for i, (z, size) in found if size != 1}


def _over(op: KernelOp, given) -> list[str]:
    return list(next(iter(given.values()))) if op.over == "..." else op.over.split()


def _fits(sizes: set[int], ranks: int) -> bool:
    """One size may be split anyhow; query and key/value heads into whole groups only."""
    return len(sizes) == 1 or (len(sizes) > 1 and all(size % ranks == 0 for size in sizes))


def _placement(letters, letter, otherwise):
    if letters is None or letter is None:
        return Replicate()
    return Shard(letters[letter][0]) if letter in letters else otherwise


def _empty(spec) -> Tensor:
    meta = spec.tensor_meta
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
