"""Processes forked from one that imported what takes long: checks, and commands of torchrun."""

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The process that is forked imports these, and does nothing else.
multiprocessing.set_forkserver_preload([
    "pytest", "hypothesis", "triton", "matplotlib.pyplot", "torch._dynamo.testing",
    "torch._dynamo.backends.inductor", "torch.distributed.device_mesh", "torch.distributed.fsdp",
    "lumina.cli", "lumina.emoji.trainer", "lumina.distributed.diffusers",
])  # fmt: skip


def launch(world, folder, function, *arguments):
    """Call it in so many processes with the environment of `torchrun`.

    Returns what each of them returned to the system, and all that they wrote.
    """
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    each = [
        context.Process(target=_ranked, args=(rank, world, port, folder, function, arguments))
        for rank in range(world)
    ]
    for process in each:
        process.start()
    for process in each:
        process.join(120)
    hung = [rank for rank, process in enumerate(each) if process.is_alive()]
    for process in each:
        process.kill()
        process.join()
    said = "".join((folder / str(rank)).read_text() for rank in range(world))
    assert not hung, f"processes {hung} did not end: {said}"
    return [process.exitcode for process in each], said


def _ranked(rank, world, port, folder, function, arguments):
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in (place | rendezvous).items()})
    torch.set_num_threads(1)
    with open(folder / str(rank), "w") as file:
        for stream in (1, 2):  # also what C++ says, and the exception that ends the process
            os.dup2(file.fileno(), stream)
    sys.exit(function(*arguments))


def run(world, checks):
    """Name -> what each rank found: a dict of errors, or the text of an exception.

    Args:
        world: processes.
        checks: name -> (function, its argument, its keyword arguments); it returns name -> error.
    """
    with tempfile.TemporaryDirectory() as folder:
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
