"""A network on several processes: what is put around it, in the order in which that works."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lumina.distributed.sequence import SequenceParallel

DIMENSIONS = ("data", "ring", "ulysses")


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    *,
    fsdp: bool = True,
    param_dtype: torch.dtype | None = None,
    checkpoint_activations: bool = False,
    compile: bool | str = False,
) -> nn.Module:
    """Spread a network over the processes of a mesh, in place, and return it.

    The order is torchtitan's: sequence parallelism, then by block activation checkpointing,
    compilation and FSDP2, so that what is compiled recomputes, and shards are gathered around both.

    Args:
        model: `NextDiT`; or, on a mesh without "ring" and "ulysses", a network of another family.
        mesh: with dimensions among "data", "ring" and "ulysses": ranks along "data" have other
            pictures, those along the other two share the tokens of theirs (`SequenceParallel`).
            None: one process, without fsdp.
        fsdp: shard the parameters by block over all ranks of the mesh (`fully_shard`), which
            averages their gradients. Without it every rank has all of them, and has to average them
            over the mesh by itself, as DDP does.
        param_dtype: with fsdp: in which dtype the parameters are gathered and the network computes,
            such as bfloat16; gradients are reduced in float32. x and cap_feats come in this dtype,
            t in float32. None: that of the parameters.
        checkpoint_activations: keep the inputs of the blocks alone, and compute the rest again in
            the backward.
        compile: compile the blocks; a name is the backend of `torch.compile`. Between ranks that
            share tokens attention is not compiled.

    Raises:
        ValueError: the mesh has other dimensions; it shares tokens, and the network cannot;
            param_dtype without fsdp.
    """
    _check(model, mesh, fsdp, param_dtype)
    if mesh is not None and {"ring", "ulysses"} & set(mesh.mesh_dim_names):
        parallel = SequenceParallel.from_mesh(mesh)
        model.sequence_parallel = parallel if parallel.size > 1 else None
    stacks = [getattr(model, name) for name in model.config.stacks]
    if checkpoint_activations:
        for blocks in stacks:
            for i, block in enumerate(blocks):
                blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)  # nothing is random
    if compile:
        backend = compile if isinstance(compile, str) else "inductor"
        whole = getattr(model, "sequence_parallel", None) is None
        for blocks in stacks:
            for block in blocks:
                block.compile(backend=backend, fullgraph=whole)
    if fsdp:
        ranks = _all_ranks(mesh)
        policy = {"param_dtype": param_dtype, "reduce_dtype": torch.float32}
        for blocks in stacks:
            for block in blocks:
                fully_shard(block, mesh=ranks, mp_policy=MixedPrecisionPolicy(**policy))
        # The time t loses 16 of its bits as a bfloat16.
        policy = MixedPrecisionPolicy(**policy, cast_forward_inputs=False)
        fully_shard(model, mesh=ranks, mp_policy=policy)
    return model


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 around a module that is trained with the network, such as an encoder, over all ranks of
    the same mesh; gradients are reduced in float32."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    return fully_shard(module, mesh=_all_ranks(mesh), mp_policy=policy)


def _all_ranks(mesh: DeviceMesh) -> DeviceMesh:
    return mesh if mesh.ndim == 1 else mesh._flatten()


def _check(model, mesh, fsdp, param_dtype) -> None:
    if mesh is None:
        if fsdp:
            raise ValueError("fsdp needs a mesh, got None")
        return
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(DIMENSIONS):
        raise ValueError(f"mesh must have dimensions among {DIMENSIONS}, got {names}")
    if {"ring", "ulysses"} & set(names) and not hasattr(model, "sequence_parallel"):
        raise ValueError(
            f"a network must have sequence_parallel to share tokens, {type(model).__name__} has not"
        )
    if param_dtype is not None and not fsdp:
        raise ValueError("param_dtype needs fsdp")
