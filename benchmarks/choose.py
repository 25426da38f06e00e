"""Makes the table of measured configurations and backends: python -m benchmarks.choose ROWS

ROWS is what `python -m benchmarks.gpu.sweep` wrote, on any number of GPUs; a last line that is cut
off does no harm. What the table has already stays where the rows do not show something faster by
2 %, so that noise changes nothing. Writes lumina_kernels/measured.json and prints what changed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from benchmarks.harness.rows import read
from lumina_kernels import backend, measured
from lumina_kernels.output import replace

TABLE = Path(measured.__file__).with_name("measured.json")
LEAST_GAIN = 1.02
TRITON, CUDA = "lumina-triton", "lumina-cuda"


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.choose")
    parser.add_argument("rows", type=Path, nargs="+", help="of benchmarks.gpu.sweep")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: %(default)s")
    args = parser.parse_args()
    table = json.loads(args.table.read_text()) if args.table.exists() else {}
    rows = [row for path in args.rows for row in read(path)]
    machines = {row["arch"]: row["machine"] for row in rows if "machine" in row}
    measured_rows = [row for row in rows if "seconds" in row]
    for arch, machine in machines.items():
        here = [row for row in measured_rows if row["arch"] == arch]
        entry = table.setdefault(f"sm_{arch}", {"measured": ""})
        changes = configurations(here)
        for name, (configuration, gain) in changes.items():
            print(f"sm_{arch}  {name}: {configuration}, {gain:.2f} times as fast")
        entry["configurations"] = entry.get("configurations", {}) | {
            name: configuration for name, (configuration, _) in changes.items()
        }
        bounds = triton_bounds(here)
        for op, bound in bounds.items():
            print(f"sm_{arch}  {op}: Triton from {bound} values on")
        entry["triton_from"] = entry.get("triton_from", {}) | bounds
        if changes or bounds:
            names = (machine.get("gpu"), *(f"{x} {machine.get(x)}" for x in ("triton", "torch")))
            told = f"{', '.join(map(str, names))}, commit {machine.get('commit')}"
            entry["measured"] = "; ".join(filter(None, (entry["measured"], told)))
    replace(args.table, lambda file: file.write_text(text_of(table)))
    print(f"{args.table}: from {len(measured_rows)} rows")
    return 0


def configurations(rows: list[dict]) -> dict[str, tuple[dict, float]]:
    """Entry of the table -> what is faster than what it has now, and how many times."""
    found = {}
    for row in rows:
        if row.get("kernel"):
            key = measured.name_of(row["kernel"], row["size"], row["bits"] // 8)
            text = json.dumps(row["configuration"])
            found.setdefault(key, {}).setdefault(text, {})[row["shape"]] = row["seconds"]
    chosen = {}
    for key, tried in found.items():
        now = tried.pop("{}", {})
        gains = {
            text: mean_gain(now, times)
            for text, times in tried.items()
            if times.keys() >= now.keys()
        }
        best = max(gains, key=gains.get, default=None)
        if now and best is not None and gains[best] >= LEAST_GAIN:
            chosen[key] = json.loads(best), gains[best]
    return chosen


def mean_gain(before: dict[str, float], after: dict[str, float]) -> float:
    """How many times as fast, as the geometric mean over the shapes."""
    logs = [math.log(before[shape] / after[shape]) for shape in before]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


def triton_bounds(rows: list[dict]) -> dict[str, int | None]:
    """Op -> values from which Triton is faster in a row of calls, None for never; without the ops
    for which the rule of `lumina_kernels.backend` says the same at all sizes that were measured."""
    times = {}
    for row in rows:
        if not row["backward"] and not row.get("kernel") and "steady" in row:
            if "-valid" not in row["shape"] and "-text" not in row["shape"]:
                sizes = times.setdefault(row["op"], {}).setdefault(row["values"], {})
                sizes[row["variant"]] = row["steady"]
    found = {}
    for op, sizes in times.items():
        both = {n: z for n, z in sorted(sizes.items()) if TRITON in z and CUDA in z}
        if len(both) < 2:
            continue
        best = min(bounds_between(list(both)), key=lambda bound: (cost(bound, both), bound))
        if cost(backend.LARGE, both) > cost(best, both) + math.log(LEAST_GAIN):
            found[op] = None if best == math.inf else best
    return found


def bounds_between(sizes: list[int]) -> list[float]:
    """One below all sizes, one between each two, and none."""
    pairs = zip(sizes, sizes[1:], strict=False)
    return [1, *(round(math.sqrt(a * b)) for a, b in pairs), math.inf]


def cost(bound: float, sizes: dict[int, dict[str, float]]) -> float:
    """The sum of log time with Triton from `bound` on."""
    return sum(math.log(z[TRITON if n >= bound else CUDA]) for n, z in sizes.items())


def text_of(table: dict) -> str:
    """JSON with a line for each entry."""
    parts = []
    for arch, entry in table.items():
        lines = [
            f"  {json.dumps(name)}: {json.dumps(value)}"
            for name, value in sorted(entry["configurations"].items(), key=order)
        ]
        body = "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"
        parts.append(
            f' {json.dumps(arch)}: {{\n "measured": {json.dumps(entry["measured"])},\n'
            f' "configurations": {body},\n "triton_from": {json.dumps(entry["triton_from"])}\n }}'
        )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def order(item) -> tuple:
    kernel, size, bits = item[0].split(", ")
    return kernel, int(size), bits


if __name__ == "__main__":
    sys.exit(main())
