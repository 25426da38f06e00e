"""A table of what Triton's kernels are predicted to take on every GPU of `lumina_kernels.machine`:

    python -m lumina_kernels.aot --first --side 64 --head-dim 72 --dtype bf16 --json after.json
    python -m benchmarks.triton_code [before.json] after.json

The calls are those of Lumina-Next at 1024 pixels, 2 x 4096 tokens. A cell has microseconds, those
before and those after, and of the latter the share of the rate of a copy (of attention: of the data
sheet's tensor FLOPs) and the largest term. The other columns are those of `ARCH`, and with a file
from before registers and stack are of both.
"""

import argparse
import json
from pathlib import Path

from lumina_kernels.machine import MACHINES

ARCH = 90
FIGURES = "registers (stack)", "blocks", "waves", "in flight, KiB", "issue", "waits", "barriers"


def table(rows: list[dict], before: list[dict]) -> str:
    """In Markdown; `before` may be empty."""
    found, old = _by_kernel(rows), _by_kernel(before)
    head = "kernel", *FIGURES, *MACHINES
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key in sorted({key[:-1] for key in found}):
        here, was = found.get((*key, ARCH)), old.get((*key, ARCH))
        if here is not None:
            cells = [_name(key), *_figures(here, was)]
            cells += [_time(gpu, found, old, key) for gpu in MACHINES.values()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_kernel(rows: list[dict]) -> dict[tuple, dict]:
    """By op, kernel, how often the op has launched that kernel before, and architecture."""
    found = {}
    for row in rows:
        number = 0
        while (key := (row["op"], row["kernel"], number, row["arch"])) in found:
            number += 1
        found[key] = row
    return found


def _name(key: tuple) -> str:
    op, kernel, number = key
    name = f"`{kernel.removesuffix('_kernel')}`"
    if not kernel.startswith(op):
        name += f" of `{op}`"
    return name + (f", {number + 1}" if number else "")


def _figures(row: dict, was: dict | None) -> list[str]:
    registers = [
        f"{z['registers']}" + (f" ({z['stack']})" if z["stack"] else "") for z in (was, row) if z
    ]
    waits = "" if row["waits"] is None else f"{row['waits']:.2f}"
    figures = f"{row['resident']}", f"{row['waves']:.1f}", f"{row['in_flight'] / 1024:.0f}"
    return ["; ".join(registers), *figures, f"{row['per_copy']:.2f}", waits, f"{row['barriers']}"]


def _time(gpu, found: dict, old: dict, key: tuple) -> str:
    times = [z.get((*key, gpu.arch), {}).get("predicted", {}).get(gpu.name) for z in (old, found)]
    if times[1] is None:
        return ""
    us = "; ".join(f"{z['us']:.0f}" for z in times if z)
    return f"{us} ({100 * times[1]['share']:.0f}%, {times[1]['limit']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("rows", type=Path, nargs="+", help="JSON of lumina_kernels.aot")
    *before, after = [json.loads(path.read_text()) for path in parser.parse_args().rows]
    print(table(after, *before or [[]]))


if __name__ == "__main__":
    main()
