"""Predicted beside measured times of Triton's kernels: python -m benchmarks.gpu.predicted ROWS

ROWS is what `python -m benchmarks.gpu.sweep` wrote, on a GPU of `lumina_kernels.machine`; none is
needed here. Every op is compiled for that GPU as it was measured, and what
`lumina_kernels.prediction` says of the kernels that it launches is added. Prints a table in
Markdown, the worst predictions first.
"""

import argparse
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.gpu.sweep import SMALL, TRITON, all_tasks, case_of
from benchmarks.harness import case as cases
from benchmarks.harness.rows import with_machines
from benchmarks.harness.shapes import Shape
from lumina_kernels import aot
from lumina_kernels.machine import MACHINES, Machine

HEAD = "op", "shape", "measured, us", "predicted, us", "predicted / measured", "limit"


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.predicted")
    parser.add_argument("rows", type=Path, nargs="+", help="of benchmarks.gpu.sweep")
    parser.add_argument("--small", action="store_true", help="if the sweep was run with it")
    args = parser.parse_args()
    tasks, found = list(all_tasks(SMALL if args.small else None)), {}
    for path in args.rows:
        for row in with_machines(path):
            if row.get("variant") == TRITON and "seconds" in row and not row.get("kernel"):
                gpu = machine_of(row["machine"].get("gpu"))
                found[gpu, row["task"]] = row["seconds"] * 1e6
    for gpu in dict.fromkeys(gpu for gpu, _ in found):
        measured = {number: us for (of, number), us in found.items() if of is gpu}
        lines = []
        with predictions(gpu) as predicted:
            for number, us in tqdm(measured.items(), disable=None):
                task = tasks[number]
                time, limit = predicted(task.op, task.shape)
                lines.append((time / us, task.op, str(task.shape), us, time, limit))
        print(table(gpu.name, sorted(lines)))
    return 0


def machine_of(name: str | None) -> Machine:
    """Raises SystemExit: the model knows no such GPU."""
    known = [machine for machine in MACHINES.values() if machine.name in (name or "")]
    if not known:
        sys.exit(f"nothing is predicted of {name}; known are {', '.join(MACHINES)}")
    return known[0]


@contextmanager
def predictions(gpu: Machine):
    """A function of op and shape: microseconds of all kernels of a call, and what limits the
    longest one."""
    files = {}  # of machine code
    names = mock.patch.object(cases, "our_variants", lambda device: (TRITON,))
    with names, aot.offline(gpu.arch) as (compiled, launches):

        def predicted(op: str, shape: Shape) -> tuple[float, str]:
            compiled.clear(), launches.clear()
            with torch.set_grad_enabled(shape.backward):
                case = case_of(op, shape, "cpu")
                cases.caller(case.ours[TRITON], case, case.inputs)()
            for new in compiled:
                path = next(Path(path) for path in new.values() if str(path).endswith(".cubin"))
                files[path.read_bytes()] = new
            useful, times = aot.useful_share(op, shape.K), []
            for launch in launches:
                (row,) = aot.figures([files[launch[0]]], [launch], gpu.arch, useful)
                times.append(row["predicted"][gpu.name])
            return sum(z["us"] for z in times), max(times, key=lambda z: z["us"])["limit"]

        yield predicted


def table(gpu: str, lines: list[tuple]) -> str:
    median = statistics.median(ratio for ratio, *_ in lines)
    rows = [f"{gpu}: the median of predicted to measured is {median:.2f}.", ""]
    rows += ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for ratio, op, shape, measured, us, limit in lines:
        rows.append(f"| `{op}` | {shape} | {measured:.1f} | {us:.1f} | {ratio:.2f} | {limit} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
