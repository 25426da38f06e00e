"""Times what computes the same, side by side: in turns, in one process, with its ceilings.

A case is an op or a model on one shape, a variant one way to compute it: this package, eager
PyTorch, `torch.compile` of that, another package. Every round calls each variant once, so that a
machine that slows down slows all of them. The ceilings are called in the same rounds: a clone that
reads and writes as many bytes as the case must, and a matrix product.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# Rounds come in batches with inputs at new addresses: where memory lies changes the times of a
# CPU, and that shows as a difference between batches. Without a gap of random size in front of
# them, allocators give two addresses in turn. The slower a case, the fewer batches it gets.
MIN_BATCHES, MAX_BATCHES = 3, {"cpu": 48, "cuda": 9}
MAX_ROUNDS = {"cpu": 5, "cuda": 20}  # of a batch
MAX_GAP = 16 << 20
# Every call on a CPU finds its inputs in memory, not in caches that may be shared with neighbours:
# the calls go round copies of the inputs that together have so many bytes. (On a GPU the caches are
# written over.) Code stays where it is, as in a program that goes on calling.
COLD, MAX_COPIES = 96 << 20, 48
# Relative RMS distance of a variant from eager PyTorch. In 16 bits, eager's own roundings.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
CLONE, MATMUL = "clone", "matmul"


class Absent(Exception):
    """A variant that cannot run here; the message says why."""


@dataclass
class Case:
    """What is measured, and the work that no implementation can avoid.

    Args:
        inputs: arguments of every variant, by name.
        ours: variant -> function.
        eager: the function as users of PyTorch write it.
        bytes: what a fused kernel moves: each input read once, each output written once. 0 where
            that says nothing.
        flops: of the matrix products, masked keys left out; 0 where memory is the limit.
        peers: variant -> function without arguments that returns the function; it raises Absent
            or ImportError where it cannot run.
        own_result: peers that are not meant to give eager's result.
        model: a whole network, timed as a user calls it, not as a replayed CUDA graph.
        backward: time the gradients of all floating inputs too.
        compiled: `torch.compile` of eager is a variant.
        info: further columns, by variant; those of "" are of all rows.
    """

    inputs: dict
    ours: dict[str, Callable]
    eager: Callable
    bytes: int = 0
    flops: int = 0
    peers: dict[str, Callable] = field(default_factory=dict)
    own_result: tuple[str, ...] = ()
    model: bool = False
    backward: bool = False
    compiled: bool = True
    info: dict[str, dict] = field(default_factory=dict)


@dataclass
class Row:
    """One variant of a case, measured."""

    batches: list[list[float]]  # seconds of each call
    peak_bytes: int  # tensors that a call holds at once, besides its inputs
    difference: float | None  # RMS of (result - eager's) over RMS of eager's
    ceilings: dict[str, list[float]]  # median seconds of CLONE and MATMUL in the same batches

    @property
    def seconds(self) -> list[float]:
        return [value for batch in self.batches for value in batch]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def variants(device: str, peers: tuple[str, ...], autotune: bool) -> tuple[str, ...]:
    """The variants of a case that has these peers, ours first."""
    return (*our_variants(device), "eager", *compiled_variants(device, autotune), *peers)


def compiled_variants(device: str, autotune: bool) -> dict[str, str]:
    """Variant -> mode of `torch.compile`, without the CUDA graphs that all variants get here."""
    modes = {"compile": "default"}
    if autotune and device == "cuda":
        modes["compile-max-autotune"] = "max-autotune-no-cudagraphs"
    return modes


def our_variants(device: str) -> tuple[str, ...]:
    return ("lumina-triton", "lumina-cuda") if device == "cuda" else ("lumina-cpu",)


def ours(op: Callable, device: str, **constants) -> dict[str, Callable]:
    """`Case.ours` of an op of this package; `constants` are what asks for no gradient."""

    def variant(backend):
        return lambda **inputs: op(**inputs, **constants, backend=backend)

    return {name: variant(name.removeprefix("lumina-")) for name in our_variants(device)}


def measure(
    case: Case, device: str, seconds: float, autotune: bool = False
) -> dict[str, Row | Exception]:
    """Every variant -> what it took, or what it raised: Absent or ImportError where it is not here.

    Args:
        case: what to time.
        device: "cpu" or "cuda", where its inputs are.
        seconds: what the rounds should take together; a slow case still gets MIN_BATCHES rounds.
        autotune: on a GPU also `torch.compile` with its longest search.
    """
    torch._dynamo.reset()
    give_back_freed_memory()
    modes = compiled_variants(device, autotune) if case.compiled else {}
    functions = {
        "eager": lambda: case.eager,
        **{name: lambda function=function: function for name, function in case.ours.items()},
        **{name: lambda mode=mode: compiled(case.eager, mode) for name, mode in modes.items()},
        **case.peers,
    }
    kept, raised, peaks, differences, expected = {}, {}, {}, {}, None
    with torch.set_grad_enabled(case.backward):
        for name, make in functions.items():
            try:
                function = make()
                call = caller(function, case, case.inputs)
                results = call()  # compiles
                expected = results if name == "eager" else expected
                differences[name] = None
                if expected is not None and name not in case.own_result:
                    differences[name] = difference(name, results, expected)
                del results
                peaks[name] = peak_bytes(call, device)
                kept[name] = function
            except Exception as error:  # of one variant: the others are measured all the same
                raised[name] = error
        del expected
        gc.collect()
        gc.disable()
        try:
            batches, ceilings = run_batches(case, kept, device, seconds)
        finally:
            gc.enable()
    rows = {name: Row(batches[name], peaks[name], differences[name], ceilings) for name in batches}
    return rows | raised


def columns(case: Case, variant: str, rows: dict[str, Row | Exception]) -> dict:
    """The figures of a row; None where one says nothing."""
    row, others = rows[variant], {name: z for name, z in rows.items() if isinstance(z, Row)}
    if variant in case.own_result:  # which takes other work
        case = replace(case, bytes=0, flops=0)
    ceilings = {name: statistics.median(medians) for name, medians in row.ceilings.items()}
    time, clone, matmul = row.median, ceilings.get(CLONE), ceilings.get(MATMUL)
    matmul_flops = 2 * matmul_size(device_of(case)) ** 3
    figures = {
        "variant": variant,
        "bytes": case.bytes or None,
        "flops": case.flops or None,
        "GB/s": case.bytes and case.bytes / time / 1e9,
        "clone GB/s": clone and case.bytes / clone / 1e9,
        "of clone": case.bytes and clone and clone / time,
        "TFLOP/s": case.flops and case.flops / time / 1e12,
        "matmul TFLOP/s": matmul and matmul_flops / matmul / 1e12,
        "of matmul": matmul and case.flops / time / (matmul_flops / matmul),
        "peak MiB": row.peak_bytes / 2**20,
        "difference": row.difference,
        "batch medians": [statistics.median(batch) for batch in row.batches],
        "ceilings' batch medians": row.ceilings,
    }
    for baseline in ("eager", "compile"):
        figures[f"x {baseline}"] = baseline in others and others[baseline].median / time
    info = case.info.get("", {}) | case.info.get(variant, {})
    return {name: value or None for name, value in (figures | info).items()}


def compiled(function: Callable, mode: str) -> Callable:
    return torch.compile(function, dynamic=False, mode=mode)


def caller(function: Callable, case: Case, inputs: dict) -> Callable:
    """A call of a variant on these inputs; it returns a tuple of tensors."""
    if not case.backward:
        return lambda: as_tuple(function(**inputs))
    leaves = [z.requires_grad_() for z in inputs.values() if is_float(z)]

    def forward_and_backward():
        outs = [z for z in as_tuple(function(**inputs)) if z.requires_grad]
        douts = [torch.ones_like(out) for out in outs]
        return (*outs, *torch.autograd.grad(outs, leaves, douts))

    return forward_and_backward


def run_batches(case: Case, functions: dict, device: str, seconds: float) -> tuple[dict, dict]:
    """Seconds of every call of the variants, by batch, and the ceilings' medians of the batches."""
    time_calls = cuda_rounds if device == "cuda" else cpu_rounds
    dtype = next(z.dtype for z in case.inputs.values() if is_float(z))
    batches, done, count, rounds = {}, 0, MIN_BATCHES, 1
    while done < count:
        gap = torch.ones(random.randrange(MAX_GAP), dtype=torch.uint8, device=device)
        inputs = [
            {name: elsewhere(value) for name, value in case.inputs.items()}
            for _ in range(copies_of(case, device))
        ]
        calls = {name: [caller(f, case, z) for z in inputs] for name, f in functions.items()}
        calls |= ceiling_calls(case, dtype, device, len(inputs))
        if device == "cuda" and not (case.model or case.backward):
            calls = {name: [graphed(call) for call in same] for name, same in calls.items()}
        if done:
            time_calls(calls, 1)  # the first call finds its memory
        else:
            once = sum(times[-1] for times in time_calls(calls, 2).values())
            count = min(MAX_BATCHES[device], max(MIN_BATCHES, round(seconds / once)))
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


def copies_of(case: Case, device: str) -> int:
    size = sum(value.nbytes for value in case.inputs.values() if isinstance(value, Tensor))
    return 1 if device == "cuda" else min(MAX_COPIES, -(-COLD // max(1, size)))


def ceiling_calls(case: Case, dtype: torch.dtype, device: str, copies: int) -> dict[str, list]:
    calls = {}
    if case.bytes:
        # Not zeros: unwritten pages of those are all one page.
        sources = torch.ones(copies, case.bytes // 2, dtype=torch.uint8, device=device)
        calls[CLONE] = [source.clone for source in sources]
    if case.flops:
        n = matmul_size(device)
        x, weight = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        calls[MATMUL] = [lambda: F.linear(x, weight)]
    return calls


def matmul_size(device: str) -> int:
    """Side of the square product that stands for the rate of matrix products."""
    return 8192 if device == "cuda" else 2048


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as the allocators do that PyTorch recommends for CPUs.

    By default it gives large blocks back, or does not, as the process happened to allocate before;
    a call then has to have its pages mapped again, which may take longer than the call. Another C
    library stays as it is.
    """
    mallopt = c_function("mallopt")
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)


def give_back_freed_memory() -> None:
    """All there is now: between cases, as what is left of one lies where the next finds no room."""
    gc.collect()
    trim = c_function("malloc_trim")
    if trim:
        trim(0)


def c_function(name: str) -> Callable | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None


def cpu_rounds(calls: dict[str, list[Callable]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call; `calls` has the same call on several copies of its inputs."""
    times, turn = {name: [] for name in calls}, 0
    for _ in range(rounds):
        for name, same in calls.items():
            call, turn = same[turn % len(same)], turn + 1
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def cuda_rounds(calls: dict[str, list[Callable]], rounds: int) -> dict[str, list[float]]:
    """Between events on the stream. Before each call the L2 cache is written over, which also gives
    the host a head start, so that the time is the GPU's."""
    scrap = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    events = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call,) in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scrap.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / 1e3 for start, end in pairs]
        for name, pairs in events.items()
    }


def graphed(call: Callable) -> Callable:
    """A replay of `call` as a CUDA graph; `call` itself where it cannot be recorded."""
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


def peak_bytes(call: Callable, device: str) -> int:
    """Most bytes of tensors that exist at once during a call, besides those before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [z for z in profile.profiler.kineto_results.events() if z.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def difference(name: str, results: tuple, expected: tuple) -> float:
    """RMS distance of all floating results over their RMS.

    Raises:
        AssertionError: it is more than roundings explain: the variant computes something else.
    """
    assert len(results) == len(expected), f"{name} returns {len(results)}, not {len(expected)}"
    pairs = [(a.double(), b.double()) for a, b in zip(results, expected, strict=True)]
    distance = sum((a - b).square().sum().item() for a, b in pairs)
    size = sum(b.square().sum().item() for _, b in pairs)
    relative = (distance / size) ** 0.5 if size else distance**0.5
    allowed = TOLERANCE[next(z.dtype for z in expected if is_float(z))]
    assert relative <= allowed, f"{name} differs from eager by {relative:.2g} (RMS)"
    return relative


def device_of(case: Case) -> str:
    return next(z.device.type for z in case.inputs.values() if is_float(z))


def as_tuple(results) -> tuple:
    """The tensors among a function's results."""
    results = results if isinstance(results, (tuple, list)) else (results,)
    return tuple(z for z in results if isinstance(z, Tensor))


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def elsewhere(value):
    """The same numbers at another address; views keep their strides, and stay."""
    return value.detach().clone() if isinstance(value, Tensor) and value.is_contiguous() else value
