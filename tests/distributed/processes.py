"""Checks that run in several processes, all in the same ones: starting them takes seconds."""

import multiprocessing
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SLOW = (
    "torch._dynamo.testing", "torch._dynamo.backends.inductor", "torch.distributed.fsdp", "triton",
    "hypothesis",
)  # fmt: skip


def run(world, checks, preload=()):
    """Name -> what each rank found: a dict of errors, or the text of an exception.

    Args:
        world: processes.
        checks: name -> (function, its argument, its keyword arguments); it returns name -> error.
        preload: more modules that take long to import.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Forked from a process that imported what takes long, and did nothing else.
        multiprocessing.set_forkserver_preload(
            ["pytest", "torch.distributed.device_mesh", *SLOW, *preload]
        )
        arguments = (world, folder, checks)
        mp.start_processes(_main, arguments, nprocs=world, start_method="forkserver")
        each = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]
    return {name: [found.get(name, "not reached") for found in each] for name in checks}


def _main(rank, world, folder, checks):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    torch.set_num_threads(1)
    found = {}
    for name, (check, argument, others) in checks.items():
        torch.manual_seed(0)
        try:
            found[name] = check(argument, **others)
        except Exception:  # reported by the test of that check
            found[name] = traceback.format_exc()
            if "Timed out" in found[name]:
                break  # the other ranks are elsewhere
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def mean(tensors):
    """Of each, by name, over all processes, as FSDP reduces gradients: not in 16 bits."""
    flat = torch.cat([x.detach().flatten() for x in tensors.values()])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    dist.all_reduce(flat)
    each = (flat / dist.get_world_size()).split([x.numel() for x in tensors.values()])
    return {n: y.view(x.shape).to(x.dtype) for (n, x), y in zip(tensors.items(), each, strict=True)}


def error(found, expected, floor=0.0):
    """The largest one, over the largest number that is expected."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not found.isfinite().all():
        return float("inf")
    if found.numel() == 0:
        return 0.0
    size = max(expected.abs().max().item(), floor, 1e-30)
    return (found - expected).abs().max().item() / size


def refuses(kind, text, call, *arguments, **others):
    """0, where the call raises such an exception with this text; else 1."""
    try:
        call(*arguments, **others)
    except kind as error:
        return 0.0 if text in str(error) else 1.0
    return 1.0
