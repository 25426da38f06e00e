"""A network on several processes: what is put around it, in the order in which that works."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lumina.distributed.sequence import SequenceParallel

DIMENSIONS = ("replicate", "data", "ring", "ulysses")


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
        model: `NextDiT`, `Lumina2` or `ZImage`.
        mesh: with dimensions among "replicate", "data", "ring" and "ulysses": ranks along the first
            two have other pictures, those along the other two share the tokens of theirs
            (`SequenceParallel`). None: one process, without fsdp.
        fsdp: shard the parameters by block (`fully_shard`) over all ranks of the mesh, or over
            those of each replica (HSDP), and average their gradients over all. Without it every
            rank has all of them, and has to average them over the mesh by itself, as DDP does.
        param_dtype: with fsdp: in which dtype the parameters are gathered and the network computes,
            such as bfloat16; gradients are reduced in float32. x and cap_feats come in this dtype,
            t in float32. None: that of the parameters.
        checkpoint_activations: keep the inputs of the blocks alone, and compute the rest again in
            the backward.
        compile: compile the blocks; a name is the backend of `torch.compile`. Between ranks that
            share tokens attention is not compiled.

    Raises:
        ValueError: the mesh has other dimensions, or "replicate" not as the first of several; it
            shares tokens, and the network cannot; param_dtype without fsdp.
    """
    _check(model, mesh, fsdp, param_dtype)
    if mesh is not None and {"ring", "ulysses"} & set(mesh.mesh_dim_names):
        SequenceParallel.from_mesh(mesh).share(model)
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
        ranks = _shards(mesh)
        policy = {"param_dtype": param_dtype, "reduce_dtype": torch.float32}
        for blocks in stacks:
            for block in blocks:
                fully_shard(block, mesh=ranks, mp_policy=MixedPrecisionPolicy(**policy))
        # The time t loses 16 of its bits as a bfloat16.
        policy = MixedPrecisionPolicy(**policy, cast_forward_inputs=False)
        fully_shard(model, mesh=ranks, mp_policy=policy)
    return model


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 around a module that is trained with the network, such as an encoder, as that one over
    the same mesh; gradients are reduced in float32."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    return fully_shard(module, mesh=_shards(mesh), mp_policy=policy)


def _shards(mesh: DeviceMesh) -> DeviceMesh:
    """What `fully_shard` takes: all ranks in one dimension, or replicas and the ranks of each."""
    if mesh.ndim == 1:
        return mesh
    first, *rest = mesh.mesh_dim_names
    if first != "replicate":
        return mesh._flatten()
    if len(rest) == 1:
        return mesh
    return DeviceMesh(mesh.device_type, mesh.mesh.flatten(1), mesh_dim_names=("replicate", "shard"))


def _check(model, mesh, fsdp, param_dtype) -> None:
    if mesh is None:
        if fsdp:
            raise ValueError("fsdp needs a mesh, got None")
        return
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(DIMENSIONS):
        raise ValueError(f"mesh must have dimensions among {DIMENSIONS}, got {names}")
    if "replicate" in names and (names[0] != "replicate" or len(names) == 1):
        raise ValueError(f'"replicate" must be the first of several dimensions, got {names}')
    if len(names) > 2 and names[0] == "replicate" and mesh.size() != dist.get_world_size():
        raise ValueError(
            f"a mesh of these three or more dimensions must have all processes, got {mesh.size()}"
        )
    if param_dtype is not None and not fsdp:
        raise ValueError("param_dtype needs fsdp")
