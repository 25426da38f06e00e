"""Speed of diffusers' networks after `lumina_kernels.patch`: python -m benchmarks.patched --out DIR

    python -m benchmarks.patched -k "L1024 and bfloat16" --out DIR
    python -m benchmarks.patched -k block --out DIR
    python -m benchmarks.patched -k L4096 --default-allocator --out DIR

Measures benchmarks/models/bench_patched.py and bench_patched_block.py, or the tests of them that
pytest's expression -k selects, and prints a Markdown table: milliseconds, and in brackets how many
times as fast as eager PyTorch. DIR gets the files of `benchmarks.report`; report.json has the
versions, the commit and the machine.

The allocator keeps freed memory, as those do that PyTorch recommends for CPUs. With
--default-allocator it is the C library's, as in a process where nobody has chosen one: eager
PyTorch, which allocates more, then waits for the system longer.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.harness.tables import grid, median, not_measured, number

FILES = tuple(f"benchmarks/models/bench_{name}.py" for name in ("patched", "patched_block"))


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.patched", description=__doc__.split(":")[0]
    )
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="of pytest")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which is slow")
    parser.add_argument(
        "--default-allocator", action="store_true", help="of the C library, as it is"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--threads", type=int, default=2, help="on the CPU (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="at least (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a case, if it has more")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    arguments = [*FILES, "-k", args.k, "--seconds", str(args.seconds)]
    arguments += ["--device", args.device or ("cuda" if torch.cuda.is_available() else "cpu")]
    arguments += ["--batches", str(args.repeats)] + ["--no-compile"] * (not args.compile)
    arguments += ["--default-allocator"] * args.default_allocator
    found = report.run(arguments, args.out)
    found["command"] = shlex.join(["python", "-m", "benchmarks.patched", *sys.argv[1:]])
    report.write(found, args.out)
    print(*table(found["benchmarks"]), sep="\n")
    missing = found["not_measured"]
    print(*not_measured(missing) * bool(missing), sep="\n")
    return int(any(entry["outcome"] == "failed" for entry in missing))


def table(rows: list[dict]) -> list[str]:
    """A line for each case and a column for each variant, eager first."""
    cases = {}
    for row in rows:
        cases.setdefault(row["group"], {})[row["extra_info"]["variant"]] = row
    variants = dict.fromkeys(name for of in cases.values() for name in ("eager", *of))
    columns = {"case": list(cases)}
    for name in variants:
        columns[f"{name}, ms"] = [cell(of.get(name)) for of in cases.values()]
    return grid(columns)


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    speed = row["extra_info"]["x eager"]
    is_eager = row["extra_info"]["variant"] == "eager"
    return number(1e3 * median(row)) + ("" if is_eager or speed is None else f" ({speed:.2f})")


if __name__ == "__main__":
    sys.exit(main())
