"""Backends, peers and configurations of every op on this GPU: python -m benchmarks.gpu.sweep ROWS

Without torch.compile. A row is appended to ROWS as soon as it is measured, and what decides most
comes first: every op at a model's size on each backend and by PyTorch; its backward; sizes at which
another backend may be faster; configurations of Triton's kernels; peers that have to be compiled.
Configurations are compiled beforehand by all cores. `python -m benchmarks.choose ROWS` makes the
table of what was fastest.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from pathlib import Path
from unittest import mock

import torch

from benchmarks.gpu.candidates import Candidates, all_candidates
from benchmarks.harness import case as cases
from benchmarks.harness.case import Case, Unavailable, caller
from benchmarks.harness.hopper import HOPPER
from benchmarks.harness.machine import describe
from benchmarks.harness.measure import Row, measure_variants
from benchmarks.harness.rows import append, read
from benchmarks.harness.shapes import COMPACT, LUMINA_NEXT, Shape
from benchmarks.harness.timing import time_variants
from lumina_kernels import aot, measured
from lumina_kernels.ops import OPS

TRITON, CUDA = "lumina-triton", "lumina-cuda"
PEERS = (HOPPER, "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "liger")
COMPILED_PEERS = ("flex",)
SIDES = (16, 32, 128)  # besides the model's 64
MAX_CALLS = 30  # of a row of them
SMALL = COMPACT.but(T=8, dtype="float16")
# After one of these errors every later CUDA call in the process fails: run this again, it goes on
# with the next task.
FATAL, AGAIN = ("CUDA error", "illegal memory access"), 3


@dataclass
class Task:
    """What is measured together: some variants, or Triton with one configuration."""

    op: str
    shape: Shape
    variants: tuple[str, ...]
    kernel: str | None = None
    size: int = 0
    configuration: dict | None = None
    compiled: AsyncResult | None = None


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.sweep")
    parser.add_argument("rows", type=Path, help="file to append to")
    parser.add_argument("--budget", type=float, default=480, help="seconds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a task's calls")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument(
        "--small", action="store_true", help="small shapes, to try this program out"
    )
    args = parser.parse_args()
    end = time.monotonic() + args.budget
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    tasks = dict(enumerate(all_tasks(SMALL if args.small else None)))
    if args.small:
        tasks = {i: task for i, task in tasks.items() if i % 24 == 0 or i == len(tasks) - 1}
    before = read(args.rows) if args.rows.exists() else []
    done = {row.get("task") for row in before}
    left = {i: task for i, task in tasks.items() if i not in done}
    append(args.rows, {"machine": describe("cuda"), "arch": arch})
    failed = sum(row.get("failed", False) for row in before)
    with Pool(args.jobs) as pool:
        for task in left.values():
            if task.configuration is not None:
                task.compiled = pool.apply_async(compile_ahead, (replace(task), arch))
        for i, task in left.items():
            if time.monotonic() > end:
                break
            for row in rows_of(task, arch, args.seconds):
                append(args.rows, row | {"task": i})
                failed += row.get("failed", False)
                print(line(row), flush=True)
                if any(text in row.get("error", "") for text in FATAL):
                    return AGAIN
            done.add(i)
    print(f"{len(done & tasks.keys())} of {len(tasks)} tasks are done, {failed} rows failed")
    return int(failed > 0)


def all_tasks(small: Shape | None):
    """In the order of what they decide."""
    model = small or LUMINA_NEXT
    ops = sorted(OPS, key=lambda op: op != "gqa_attention")
    ours = (TRITON, CUDA)
    for op in ops:
        yield Task(op, shape_of(op, model), (*ours, "eager", *PEERS))
    for op in ops:
        if op != "guided_step":
            yield Task(op, shape_of(op, model.but(backward=True)), (*ours, "eager", *PEERS))
    text = model.but(text=True)
    yield Task("gqa_attention", text, (*ours, "eager"))
    yield Task("gqa_attention", text.but(backward=True), (*ours, "eager"))
    yield Task("gqa_attention", model.but(valid=0.75), (*ours, "eager"))
    for side in SIDES if small is None else (8,):
        for op in ops:
            yield Task(op, shape_of(op, model.but(side=side)), ours)
    for of in all_candidates(model, ()) if small else all_candidates():
        yield from configurations(of)
    yield Task("gqa_attention", model, ("eager", *COMPILED_PEERS))


def configurations(of: Candidates):
    """What the table has now, by an empty configuration, and the others."""
    for configuration in ({}, *of.configurations):
        yield Task(of.op, of.shape, (TRITON,), of.kernel, of.size, configuration)


def shape_of(op: str, shape: Shape) -> Shape:
    pooled = op in ("context_drop", "qk_norm_rope3d_pool")
    return shape.but(drop=2) if pooled else shape


def case_of(op: str, shape: Shape, device: str) -> Case:
    torch.manual_seed(0)
    return import_module(f"benchmarks.ops.bench_{op}").case(shape, device)


def rows_of(task: Task, arch: int, seconds: float):
    """The rows of a task; an error of all of it is a row, too."""
    about = {"op": task.op, "shape": str(task.shape), "model": task.shape.model, "arch": arch}
    about |= {"dtype": task.shape.dtype, "L": task.shape.L, "backward": task.shape.backward}
    try:
        case = case_of(task.op, task.shape, "cuda")
        values = next(iter(case.inputs.values())).numel()
        about |= {"values": values, "bits": 8 * case.dtype.itemsize}
        if task.configuration is None:
            yield from variant_rows(task, case, about, seconds)
        else:
            yield configuration_row(task, case, about, seconds)
    except Exception as error:
        about |= {"variant": task.variants[0], "kernel": task.kernel}
        about |= {"configuration": task.configuration}
        yield about | failure(error, task.configuration)
    torch.cuda.empty_cache()


def variant_rows(task: Task, case: Case, about: dict, seconds: float):
    makers = {"eager": lambda: case.eager}
    makers |= {name: lambda function=function: function for name, function in case.ours.items()}
    makers = {name: make for name, make in (makers | case.peers).items() if name in task.variants}
    found = measure_variants(case, makers, "cuda", seconds, batches=3)
    for name, row in found.items():
        figures = about | {"variant": name}
        if isinstance(row, Row):
            figures |= {"seconds": row.median, "difference": row.difference}
            figures |= {"peak MiB": row.peak_bytes / 2**20}
            figures |= {z: statistics.median(times) for z, times in row.ceilings.items()}
            figures["steady"] = steady_seconds(makers[name](), case, seconds / row.median)
        else:
            figures |= failure(row)
        yield figures


def configuration_row(task: Task, case: Case, about: dict, seconds: float) -> dict:
    about |= {"variant": TRITON, "kernel": task.kernel, "size": task.size}
    about |= {"configuration": task.configuration}
    waited = time.monotonic()
    if task.compiled is not None:
        task.compiled.wait()  # what does not compile there does not here either
    waited = time.monotonic() - waited
    case = replace(case, bytes=None, flops=None)  # no ceilings
    function = case.ours[TRITON]
    itemsize = case.dtype.itemsize
    with torch.set_grad_enabled(case.backward):
        expected = caller(function, case, case.inputs)()
        with trying(about["arch"], task.kernel, task.size, itemsize, task.configuration):
            results = caller(function, case, case.inputs)()
            difference = cases.difference(task.kernel, results, expected)
            times, _ = time_variants(case, {TRITON: function}, "cuda", seconds, 3)
    values = [value for batch in times[TRITON] for value in batch]
    about |= {"seconds": statistics.median(values), "difference": difference}
    return about | {"waited for compiler": waited}


def steady_seconds(function: Callable, case: Case, calls: float) -> float:
    """Of an eager call in a row of them: the host's part, where that is longer."""
    calls = max(2, min(MAX_CALLS, round(calls)))
    with torch.set_grad_enabled(case.backward):
        call = caller(function, case, case.inputs)
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def failure(error: Exception, configuration: dict | None = None) -> dict:
    """What does not exist here is no failure, nor is a configuration that does not fit or compile;
    one that computes something else is."""
    text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    is_expected = isinstance(error, (Unavailable, ImportError, NotImplementedError))
    if configuration and not isinstance(error, AssertionError):
        is_expected = True
    return {"error": text} | ({} if is_expected else {"failed": True})


@contextmanager
def trying(arch: int, kernel: str, size: int, itemsize: int, configuration: dict):
    """The table has this configuration, or with {} what it has."""
    table = measured.TABLE.setdefault(f"sm_{arch}", {})
    entries = table.setdefault("configurations", {})
    name = measured.name_of(kernel, size, itemsize)
    changes = {name: configuration} if configuration else {}
    with mock.patch.dict(entries, changes):
        forget()
        yield
    forget()


def forget() -> None:
    """What launchers remember of the table."""
    from lumina_kernels.triton.gqa_attention_tiles import options_on

    measured.configuration.cache_clear()
    options_on.cache_clear()


def Pool(jobs: int):
    """Processes that compile; they end with this one."""
    return get_context("spawn").Pool(jobs, torch.set_num_threads, (1,))


def compile_ahead(task: Task, arch: int) -> None:
    """Compile what a task launches, into Triton's cache, on a driver that launches nothing."""
    names = mock.patch.object(cases, "our_variants", lambda device: (TRITON,))
    with names, aot.offline(arch), torch.set_grad_enabled(task.shape.backward):
        case = case_of(task.op, task.shape, "cpu")
        itemsize = case.dtype.itemsize
        with trying(arch, task.kernel, task.size, itemsize, task.configuration):
            caller(case.ours[TRITON], case, case.inputs)()


def line(row: dict) -> str:
    where = f"{row['op']:21}{row['shape']:44}{row['variant']:16}"
    what = " ".join(f"{k}={v}" for k, v in (row.get("configuration") or {}).items())
    said = row.get("error") or f"{1e6 * row['seconds']:9.1f} us"
    return f"{where}{said}  {row.get('kernel') or ''} {what}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
