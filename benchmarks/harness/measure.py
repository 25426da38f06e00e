"""Measures the variants of a case: that they agree, the memory they take, and their times."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch

from benchmarks.harness.case import Case, caller, compile_modes, difference
from benchmarks.harness.memory import peak_bytes, release_freed_memory
from benchmarks.harness.timing import CLONE, MATMUL, MIN_BATCHES, matmul_size, time_variants


@dataclass
class Row:
    """One variant of a case, measured."""

    batches: list[list[float]]  # seconds of each call
    peak_bytes: int  # of tensors that a call allocates
    difference: float | None  # relative RMS distance from eager's result; None: not compared
    ceilings: dict[str, list[float]]  # median seconds of CLONE and MATMUL in the same batches

    @property
    def seconds(self) -> list[float]:
        return [value for batch in self.batches for value in batch]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    case: Case,
    device: str,
    seconds: float,
    autotune: bool = False,
    *,
    names: Container[str] | None = None,
    batches: int = MIN_BATCHES,
) -> dict[str, Row | Exception]:
    """Every variant -> its row, or what it raised: Unavailable or ImportError where it cannot run.

    Args:
        case: what to time.
        device: "cpu" or "cuda", where its inputs are.
        seconds: what the rounds should take together; a slow case takes longer, see `timing`.
        autotune: on a GPU also `torch.compile` with its longest search.
        names: the variants to measure; None: all.
        batches: of rounds, at least.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    try:
        makers = function_makers(case, device, autotune)
        chosen = {name: make for name, make in makers.items() if names is None or name in names}
        return measure_variants(case, chosen, device, seconds, batches)
    finally:
        torch.set_num_threads(threads)


def measure_variants(
    case: Case, makers: dict[str, Callable], device: str, seconds: float, batches: int
) -> dict[str, Row | Exception]:
    """`measure`, of functions that make the variants' functions."""
    torch._dynamo.reset()
    release_freed_memory()
    functions, peaks, differences, raised, expected = {}, {}, {}, {}, None
    with torch.set_grad_enabled(case.backward):
        for name, make in makers.items():
            try:
                function = make()
                call = caller(function, case, case.inputs)
                results = call()  # compiles
                if name == "eager":
                    expected = results
                comparable = expected is not None and name not in case.not_equivalent
                differences[name] = difference(name, results, expected) if comparable else None
                del results
                peaks[name] = peak_bytes(call, device)
                functions[name] = function
            except Exception as error:  # of one variant: the others are measured all the same
                raised[name] = error
        del expected
        gc.collect()
        gc.disable()
        try:
            times, ceilings = time_variants(case, functions, device, seconds, batches)
        finally:
            gc.enable()
    rows = {name: Row(times[name], peaks[name], differences[name], ceilings) for name in times}
    return rows | raised


def function_makers(case: Case, device: str, autotune: bool) -> dict[str, Callable]:
    """Variant -> function without arguments that makes the variant's function, eager first."""
    modes = compile_modes(device, autotune) if case.compiled else {}
    return {
        "eager": lambda: case.eager,
        **{name: lambda function=function: function for name, function in case.ours.items()},
        **{name: lambda mode=mode: compiled(case.eager, mode) for name, mode in modes.items()},
        **case.peers,
    }


def compiled(function: Callable, mode: str) -> Callable:
    return torch.compile(function, dynamic=False, mode=mode)


def columns(case: Case, variant: str, rows: dict[str, Row | Exception]) -> dict:
    """The figures of a measured variant; None where a figure does not apply."""
    row = rows[variant]
    equivalent = variant not in case.not_equivalent
    figures = {
        "variant": variant,
        **memory_columns(row, case.bytes if equivalent else None),
        **matmul_columns(row, case.flops if equivalent else None, case.device),
        "peak MiB": row.peak_bytes / 2**20,
        "difference": row.difference,
        "batch medians": [statistics.median(batch) for batch in row.batches],
        "ceilings' batch medians": row.ceilings,
    }
    for baseline in ("eager", "compile"):
        other = rows.get(baseline)
        figures[f"x {baseline}"] = other.median / row.median if isinstance(other, Row) else None
    return figures | case.info | case.variant_info.get(variant, {})


def memory_columns(row: Row, size: int | None) -> dict:
    """Rates at which the variant and a clone move `size` bytes."""
    if size is None:
        return dict.fromkeys(("bytes", "GB/s", "clone GB/s", "of clone"))
    clone = statistics.median(row.ceilings[CLONE])
    return {
        "bytes": size,
        "GB/s": size / row.median / 1e9,
        "clone GB/s": size / clone / 1e9,
        "of clone": clone / row.median,
    }


def matmul_columns(row: Row, flops: int | None, device: str) -> dict:
    """Rates of the variant's matrix products, which take `flops`, and of a large one."""
    if flops is None:
        return dict.fromkeys(("flops", "TFLOP/s", "matmul TFLOP/s", "of matmul"))
    rate = flops / row.median
    ceiling = 2 * matmul_size(device) ** 3 / statistics.median(row.ceilings[MATMUL])
    return {
        "flops": flops,
        "TFLOP/s": rate / 1e12,
        "matmul TFLOP/s": ceiling / 1e12,
        "of matmul": rate / ceiling,
    }
