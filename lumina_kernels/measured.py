"""What was measured on GPUs: measured.json, which `python -m benchmarks.choose` writes.

For each architecture it has a line for every configuration, "kernel, size, bits of a value": launch
options by name, which replace those that the launcher has by rule; and in "triton_from" for an op
the number of values from which Triton's kernel is faster than the CUDA C++ one, null for never.
What is not in it was not measured.
"""

import json
import math
from functools import cache
from pathlib import Path

TABLE = json.loads(Path(__file__).with_name("measured.json").read_text())


@cache
def configuration(arch: int, kernel: str, size: int, itemsize: int) -> dict:
    """Launch options of a Triton kernel, for values of `itemsize` bytes; empty: not measured.

    `size` is what the launcher distinguishes: the width of a row, the values of a token, the
    largest head_dim that shares a configuration; 1 where nothing is."""
    entries = TABLE.get(f"sm_{arch}", {}).get("configurations", {})
    return entries.get(name_of(kernel, size, itemsize), {})


def name_of(kernel: str, size: int, itemsize: int) -> str:
    """The name of an entry of the table."""
    return f"{kernel}, {size}, {8 * itemsize} bits"


def triton_from(arch: int, op: str, unknown: int) -> float:
    """Values from which Triton comes before CUDA C++; `unknown`: where that was not measured."""
    bounds = TABLE.get(f"sm_{arch}", {}).get("triton_from", {})
    bound = bounds.get(op, unknown)
    return math.inf if bound is None else bound
