"""Times the variants of a case in interleaved rounds, together with the machine's ceilings.

Every round calls each variant once, so that a machine that slows down slows all of them alike. The
ceilings are called in the same rounds: a clone that reads and writes as many bytes as the case has
to, and a matrix product.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.case import Case, caller

# Rounds come in batches, and every batch has its inputs at new addresses: on a CPU the address
# changes the time, which shows as a difference between batches. A gap of random size is allocated
# before the inputs, because an allocator would otherwise alternate between two addresses. The
# slower a case, the fewer batches it gets.
MIN_BATCHES, MAX_BATCHES = 3, {"cpu": 48, "cuda": 9}
MAX_ROUNDS = {"cpu": 5, "cuda": 20}  # per batch
MAX_GAP = 16 << 20  # bytes
# On a CPU every call finds its inputs in memory, not in caches that neighbours may share: the calls
# cycle through copies of the inputs that have COLD bytes together. (On a GPU the L2 cache is
# overwritten instead.) The code of an op stays cached, as in a program that calls it repeatedly: a
# call shorter than SHORT is timed when it is made a second time, on other inputs where there are
# several copies. Otherwise what ran before would count, up to 0.15 ms for code that a slow peer had
# driven out.
COLD, MAX_COPIES = 96 << 20, 48
SHORT = 0.02  # seconds
CLONE, MATMUL = "clone", "matmul"
SCRATCH = 256 << 20  # bytes, more than any L2 cache has


def time_variants(
    case: Case,
    functions: dict[str, Callable],
    device: str,
    seconds: float,
    min_batches: int = MIN_BATCHES,
) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """Seconds of every call by variant and batch, and by ceiling the median of each batch.

    Args:
        case: what is timed.
        functions: variant -> function of the case's inputs.
        device: "cpu" or "cuda", where the inputs are.
        seconds: what all rounds should take together.
        min_batches: as many batches there are at least, however long they take.
    """
    time_calls = cuda_rounds if device == "cuda" else cpu_rounds
    batches, done, count, rounds = {}, 0, min_batches, 1
    while done < count:
        gap = torch.ones(random.randrange(MAX_GAP), dtype=torch.uint8, device=device)
        inputs = [
            {name: at_new_address(value) for name, value in case.inputs.items()}
            for _ in range(number_of_copies(case, device))
        ]
        calls = {name: [caller(f, case, z) for z in inputs] for name, f in functions.items()}
        calls |= ceiling_calls(case, device, len(inputs))
        if device == "cuda" and not case.model:
            calls = {name: [as_cuda_graph(call) for call in same] for name, same in calls.items()}
        if done > 0:
            time_calls(calls, 1)  # warm up: the first call allocates
        else:
            once = sum(times[-1] for times in time_calls(calls, 2).values())
            count = min(MAX_BATCHES[device], max(min_batches, round(seconds / once)))
            rounds = min(MAX_ROUNDS[device], max(1, round(seconds / once / count)))
        for name, times in time_calls(calls, rounds).items():
            batches.setdefault(name, []).append(times)
        done += 1
        del gap
    ceilings = {
        name: [statistics.median(batch) for batch in batches.pop(name)]
        for name in (CLONE, MATMUL)
        if name in batches
    }
    return batches, ceilings


def number_of_copies(case: Case, device: str) -> int:
    size = sum(value.nbytes for value in case.inputs.values() if isinstance(value, Tensor))
    return 1 if device == "cuda" else min(MAX_COPIES, -(-COLD // max(1, size)))


def at_new_address(value):
    """A copy of a contiguous tensor. Views stay as they are, and with them their strides."""
    return value.detach().clone() if isinstance(value, Tensor) and value.is_contiguous() else value


def ceiling_calls(case: Case, device: str, copies: int) -> dict[str, list[Callable]]:
    calls = {}
    if case.bytes is not None:
        # Not zeros: all pages of those are one page until they are written.
        sources = torch.ones(copies, case.bytes // 2, dtype=torch.uint8, device=device)
        calls[CLONE] = [source.clone for source in sources]
    if case.flops is not None:
        n = matmul_size(device)
        x, weight = (torch.randn(n, n, device=device).to(case.dtype) for _ in range(2))
        calls[MATMUL] = [lambda: F.linear(x, weight)]
    return calls


def matmul_size(device: str) -> int:
    """Side of the square matrix product whose rate is the ceiling for FLOPs."""
    return 8192 if device == "cuda" else 2048


def cpu_rounds(calls: dict[str, list[Callable]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call by variant. `calls` has the same call on several copies of the inputs,
    and successive calls, whatever their variant, take successive copies."""
    times, done = {name: [] for name in calls}, 0
    for _ in range(rounds):
        for name, same in calls.items():
            for _ in range(2):
                call = same[done % len(same)]
                done += 1
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
                if seconds >= SHORT:
                    break
            times[name].append(seconds)
    return times


def cuda_rounds(calls: dict[str, list[Callable]], rounds: int) -> dict[str, list[float]]:
    """Seconds between events on the stream, by variant. Each call comes after a kernel that
    overwrites the L2 cache; that also gives the host a head start, so that the time is the GPU's.
    """
    scratch = torch.empty(SCRATCH, dtype=torch.uint8, device="cuda")
    events = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call,) in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / 1e3 for start, end in pairs]
        for name, pairs in events.items()
    }


def as_cuda_graph(call: Callable) -> Callable:
    """A replay of `call` as a CUDA graph, or `call` itself where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay
