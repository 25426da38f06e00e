"""Compares the predictions with runs of one and two processes: python -m benchmarks.scale.check

The processes have a thread each and speak gloo. The rates that the model is fed with are measured
in them, at once, by calls of PyTorch and of attention alone; nothing is fitted. Both run each case
at once, also what one process does by itself, so that they share the memory alike. Five rounds
measure the rates and then the case; times and ratios are medians. Bytes are the model's, those that
PyTorch's exchanges were called with, and, on Linux, what the loopback device sent for a process,
headers included. Takes a minute and a half on two cores.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.harness.memory import keep_freed_memory
from benchmarks.scale.cluster import Cluster
from benchmarks.scale.counted import Sent
from benchmarks.scale.plan import Plan, Work, batch, exchanges
from benchmarks.scale.steps import seconds as predicted_seconds
from lumina import NextDiT, NextDiTConfig
from lumina.distributed.exchange import all_to_all
from lumina.distributed.parallelize import parallelize
from lumina.distributed.world import World
from lumina_kernels import gqa_attention

CONFIG = NextDiTConfig(dim=576, n_layers=2, n_heads=8, n_kv_heads=2, cap_feat_dim=256)
SIZE, TEXT, TOKENS = (48, 48), 32, 576
ROUNDS = 5
CASES = {
    "sampling, one process": (Plan(), 1, False),
    "guidance": (Plan(guidance=2), 1, False),
    "Ulysses": (Plan(ulysses=2), 1, False),
    "ring": (Plan(ring=2), 1, False),
    "training, one process": (Plan(), 2, True),
    "data": (Plan(data=2), 2, True),
    "FSDP": (Plan(data=2, shards=2), 2, True),
    "FSDP, checkpoints": (Plan(data=2, shards=2, checkpoint=True), 2, True),
    "FSDP, Ulysses": (Plan(ulysses=2, shards=2), 2, True),
    "FSDP, ring": (Plan(ring=2, shards=2), 2, True),
}


def seconds(*calls: Callable[[], object]) -> float:
    """Of calls one after the other; the processes start together."""
    dist.barrier()
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def second_time(call: Callable[[], object]) -> float:
    call()
    return seconds(call)


def cluster() -> Cluster:
    """The rates of two processes of this machine."""
    D, H, G, K = CONFIG.dim, CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim
    x, weight = torch.randn(TOKENS, D), torch.randn(CONFIG.ffn_dim, D)
    products = 2 * TOKENS * weight.numel() / second_time(lambda: F.linear(x, weight))
    q, k, v = (torch.randn(1, TOKENS, heads, K, requires_grad=True) for heads in (H, G, G))
    with torch.no_grad():
        forward = second_time(lambda: gqa_attention(q, k, v))
    both = second_time(lambda: gqa_attention(q, k, v).sum().backward())
    large = torch.randn(8 << 20)
    copy = 2 * 4 * large.numel() / second_time(large.clone)
    few, many = torch.zeros(2, 1), torch.randn(2, 1 << 20)
    call = second_time(lambda: all_to_all(few, dist.group.WORLD))
    link = 4 * (1 << 20) / (second_time(lambda: all_to_all(many, dist.group.WORLD)) - call)
    return Cluster(
        "two processes", products, 4 * TOKENS**2 * D / forward, both / forward - 1, copy, node=2,
        inside=link, call=call, overlaps=False,
    )  # fmt: skip


def run_of(
    work: Work, plan: Plan, training: bool
) -> tuple[NextDiT, Callable[[], object], Callable[[], object]]:
    """The network of this process, a call that does its part of `work` (in training the mean
    gradients), and one that takes the step."""
    names = {name: getattr(plan, name) for name in ("data", "guidance", "ring", "ulysses")}
    mesh = None
    if plan.ranks > 1:
        mesh = init_device_mesh("cpu", tuple(names.values()), mesh_dim_names=tuple(names))
    world = World("cpu", mesh)
    torch.manual_seed(0)
    model, config, B = NextDiT(work.config), work.config, batch(work, plan, training)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    dtype = torch.float32 if work.e == 4 else torch.bfloat16
    x, t = torch.randn(B, config.in_channels, *work.size).to(dtype), torch.rand(B)
    feats = torch.randn(B, work.text, config.cap_feat_dim).to(dtype)
    text = feats, torch.ones(feats.shape[:2], dtype=torch.bool)
    if not training:
        world.share(model.to(dtype))
        caption = model.encode_caption(*text)
        guidance = model.guidance_parallel

        def evaluate():
            with torch.inference_mode():
                found = model(x, t, caption)
                return found if guidance is None else guidance.both(found)

        return model, evaluate, lambda: None
    sharded = plan.shards > 1
    if not sharded:
        model.to(dtype)
    if mesh is not None or plan.checkpoint:
        parallelize(
            model, world.training_mesh, fsdp=sharded, param_dtype=dtype if sharded else None,
            checkpoint_activations=plan.checkpoint,
        )  # fmt: skip
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def gradients():
        (model(x, t, *text) - x).float().square().mean().backward()
        if not sharded:
            means = world.mean([p.grad.float() for p in parameters])
            for p, mean in zip(parameters, means, strict=True):
                p.grad = mean.to(p.dtype)

    def update():
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.01)

    return model, gradients, update


def loopback() -> int:
    """Bytes that the loopback device has sent."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
        return next(int(x.split()[9]) for x in lines if x.strip().startswith("lo:"))
    except (OSError, StopIteration):
        return 0


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rates = []
    if rank == 0:
        print(
            "| case | predicted s | measured s | ratio | MB predicted | called with | sent |\n"
            "|---|---|---|---|---|---|---|"
        )
    for name, (plan, pictures, training) in CASES.items():
        work = Work("check", CONFIG, SIZE, TEXT, pictures, 4)
        _, exchange, update = run_of(work, plan, training)
        times = []
        exchange(), update()
        for _ in range(ROUNDS):  # the rates change while others use the machine
            rates.append(cluster())
            predicted = predicted_seconds(work, plan, rates[-1], training)
            measured = seconds(exchange, update)
            times.append((predicted, measured, predicted / measured))
        own = sum(x.sent for x in exchanges(work, plan, training)) if plan.ranks > 1 else 0
        dist.barrier()
        before = loopback()
        with Sent() as sent:
            exchange()
        dist.barrier()
        wire = (loopback() - before) / 2
        if rank == 0:
            counted = sum(sent.bytes.values())
            predicted, measured, ratio = map(statistics.median, zip(*times, strict=True))
            print(
                f"| {name} | {predicted:.3f} | {measured:.3f} | {ratio:.2f} "
                f"| {own / 1e6:.3f} | {counted / 1e6:.3f} | {wire / 1e6:.3f} |",
                flush=True,
            )
    if rank == 0:

        def median(name):
            return statistics.median(getattr(x, name) for x in rates)

        print(
            f"\nMedians of the rates: products {median('matrix') / 1e9:.0f} GFLOP/s, attention "
            f"{median('attention') / 1e9:.0f}, its backward {median('backward'):.2f} times as long,"
            f" copies {median('copy') / 1e9:.1f} GB/s, gloo {median('inside') / 1e9:.2f} GB/s and "
            f"{median('call') * 1e6:.0f} us a call."
        )
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (folder,), nprocs=2, start_method="spawn")


if __name__ == "__main__":
    main()
