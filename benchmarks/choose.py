"""Makes the table of measured configurations and backends: python -m benchmarks.choose ROWS

ROWS is what `python -m benchmarks.gpu.sweep` wrote, on any number of GPUs; a last line that is cut
off does no harm. What the table has already stays where the rows do not show something faster by
2 %, so that noise changes nothing. GPUs of one architecture share its entries, so times are
compared on each by itself, and the gains averaged. Writes lumina_kernels/measured.json and prints
what changed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from benchmarks.harness.rows import with_machines
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
    machines, measured_rows = {}, []
    for path in args.rows:
        for row in with_machines(path):
            gpu = row["machine"].get("gpu")
            machines.setdefault(row["arch"], {})[gpu] = row["machine"]
            if "seconds" in row:
                measured_rows.append(row | {"gpu": gpu})
    for arch, gpus in machines.items():
        entry = table.setdefault(f"sm_{arch}", {"measured": ""})
        changes = update(entry, [row for row in measured_rows if row["arch"] == arch])
        for change in changes:
            print(f"sm_{arch}  {change}")
        if changes:
            told = [*entry["measured"].split("; "), *map(about, gpus.values())]
            entry["measured"] = "; ".join(dict.fromkeys(filter(None, told)))
    replace(args.table, lambda file: file.write_text(text_of(table)))
    print(f"{args.table}: from {len(measured_rows)} rows")
    return 0


def update(entry: dict, rows: list[dict]) -> list[str]:
    """Put what was fastest into the table's entry of an architecture; what changed, in words."""
    known, changes = entry.setdefault("configurations", {}), []
    for name, (configuration, gain) in configurations(rows).items():
        if known.get(name) != configuration:
            known[name] = configuration
            changes.append(f"{name}: {configuration}, {gain:.2f} times as fast")
    known = entry.setdefault("triton_from", {})
    for op, bound in triton_bounds(rows, known).items():
        if bound == backend.LARGE:  # the rule, which no entry has to say
            del known[op]
        else:
            known[op] = None if bound == math.inf else bound
        changes.append(f"{op}: Triton from {bound} values on")
    return changes


def about(machine: dict) -> str:
    names = (machine.get("gpu"), *(f"{x} {machine.get(x)}" for x in ("triton", "torch")))
    return f"{', '.join(map(str, names))}, commit {machine.get('commit')}"


def configurations(rows: list[dict]) -> dict[str, tuple[dict, float]]:
    """Entry of the table -> what is faster than what it has now, and how many times; of what was
    measured at every shape on every GPU on which anything was compared with the present one."""
    found = {}
    for row in rows:
        if row.get("kernel"):
            key = measured.name_of(row["kernel"], row["size"], row["bits"] // 8)
            text, place = json.dumps(row["configuration"]), (row.get("gpu"), row["shape"])
            found.setdefault(key, {}).setdefault(text, {})[place] = row["seconds"]
    chosen = {}
    for key, tried in found.items():
        now = tried.pop("{}", {})
        compared = {gpu for times in tried.values() for gpu, _ in times}
        now = {place: seconds for place, seconds in now.items() if place[0] in compared}
        gains = {
            text: mean_gain(now, times)
            for text, times in tried.items()
            if times.keys() >= now.keys()
        }
        best = max(gains, key=gains.get, default=None)
        if now and best is not None and gains[best] >= LEAST_GAIN:
            chosen[key] = json.loads(best), gains[best]
    return chosen


def mean_gain(before: dict[tuple, float], after: dict[tuple, float]) -> float:
    """How many times as fast, as the geometric mean over GPUs and shapes."""
    logs = [math.log(before[place] / after[place]) for place in before]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


def triton_bounds(rows: list[dict], known: dict[str, int | None]) -> dict[str, float]:
    """Op -> values from which Triton is faster in a row of calls, infinite for never, LARGE for the
    rule of `lumina_kernels.backend`; of the ops for which that is faster than what is `known`."""
    times = {}
    for row in rows:
        if not row["backward"] and not row.get("kernel") and "steady" in row:
            if "-valid" not in row["shape"] and "-text" not in row["shape"]:
                place = row["values"], row.get("gpu")
                sizes = times.setdefault(row["op"], {}).setdefault(place, {})
                sizes[row["variant"]] = row["steady"]
    found = {}
    for op, sizes in times.items():
        both = {place: z for place, z in sizes.items() if TRITON in z and CUDA in z}
        values = sorted({n for n, _ in both})
        if len(values) < 2:
            continue
        best = min(bounds_between(values), key=lambda bound: (cost(bound, both), bound))
        enough = cost(best, both) + math.log(LEAST_GAIN)
        best = backend.LARGE if cost(backend.LARGE, both) <= enough else best
        now = known.get(op, backend.LARGE)
        if cost(math.inf if now is None else now, both) > enough:
            found[op] = best
    return found


def bounds_between(sizes: list[int]) -> list[float]:
    """One below all sizes, one between each two, and none."""
    pairs = zip(sizes, sizes[1:], strict=False)
    return [1, *(round(math.sqrt(a * b)) for a, b in pairs), math.inf]


def cost(bound: float, sizes: dict[tuple, dict[str, float]]) -> float:
    """The sum of log time with Triton from `bound` values on, over sizes and GPUs."""
    return sum(math.log(z[TRITON if n >= bound else CUDA]) for (n, _), z in sizes.items())


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
