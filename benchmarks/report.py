"""Runs the benchmarks and writes a report: Markdown, CSV, JSON and plots.

    python -m benchmarks.report --quick --out DIR

The measurements run under pytest in a child process. If that process dies, another one runs the
remaining tests, so that a crash costs the rows of one case. DIR gets report.json (in
pytest-benchmark's format), report.csv, report.md and PNG files; pytest's output is in DIR/logs.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest_benchmark
import torch
from tqdm import tqdm

from benchmarks.harness import plots, rows
from benchmarks.harness.tables import OUT_OF_BUDGET, csv_text, markdown
from lumina_kernels.output import replace

ROOT = Path(__file__).resolve().parents[1]
# After one of these errors every later CUDA call in the process fails.
FATAL = ("CUDA error", "illegal memory access")
GRACE = 12  # seconds that the last case may run beyond the budget


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one small shape of everything")
    parser.add_argument("-k", metavar="EXPRESSION", help="of pytest: only these tests")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--budget", type=float, help="seconds after which the rest is skipped")
    parser.add_argument("--seconds", type=float, help="of measurement for each case")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--rows", type=Path, nargs="+", help="report these, of pytest's --rows, and measure nothing"
    )
    args = parser.parse_args()
    if args.rows:
        found = of_rows([line for path in args.rows for line in rows.read(path)])
        found["command"] = shlex.join(["python", "-m", "benchmarks.report", *sys.argv[1:]])
        write(found, args.out)
        print(f"{args.out / 'report.md'}: {summary(found)}")
        return 0
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here")
    budget, seconds = args.budget, args.seconds
    if budget is None:
        budget = 150 if args.quick else 400 if device == "cuda" else math.inf
    if seconds is None:
        seconds = 1 if args.quick else 2
    # The ops first: a network takes as long as many of them.
    arguments = ["benchmarks/ops", "benchmarks/models"]
    arguments += ["--device", device, "--seconds", str(seconds)]
    chosen = " and ".join(["quick"] * args.quick + [f"({args.k})"] * bool(args.k))
    arguments += ["-k", chosen] if chosen else []
    arguments += ["--no-compile"] if args.no_compile else []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # writes the report, as Ctrl-C does
    report = run(arguments, args.out, budget)
    report["command"] = shlex.join(["python", "-m", "benchmarks.report", *sys.argv[1:]])
    write(report, args.out)
    print(f"{args.out / 'report.md'}: {summary(report)}")
    failed = sum(entry["outcome"] == "failed" for entry in report["not_measured"])
    return 1 if failed else 0


def summary(report: dict) -> str:
    """How many rows there are, and why the others are missing."""
    measured, others = len(report["benchmarks"]), report["not_measured"]
    failed = sum(entry["outcome"] == "failed" for entry in others)
    late = sum(entry["reason"] == OUT_OF_BUDGET for entry in others)
    return (
        f"{measured} of {measured + len(others)} rows measured, {failed} failed, "
        f"{len(others) - failed} skipped ({late} of them for want of time, see --budget)"
    )


class Progress:
    """The JSON lines that pytest's children write about their tests, shown on a progress bar."""

    def __init__(self):
        self.head, self.lines, self.bar = None, {}, tqdm(unit="test", desc="collecting")
        self.collected = False  # whether the running child has collected its tests

    def add(self, line: dict) -> None:
        self.collected = True
        if "tests" not in line:
            self.bar.update(line["test"] not in self.lines)
            self.lines[line["test"]] = line
        elif self.head is None:
            self.head, self.cases = line, split(line["tests"])
            self.bar.reset(total=len(line["tests"]))
            self.bar.set_description("measuring")
        if self.left():
            self.bar.set_postfix_str(case_name(self.cases[self.left()[0]][0]))

    def left(self) -> list[str]:
        return [test for test in self.head["tests"] if test not in self.lines]

    def give_up(self, tests: list[str], outcome: str, reason: str) -> None:
        for test in tests:
            self.add({"test": test, "outcome": outcome, "reason": reason})


def run(arguments: list[str], out: Path, budget: float = math.inf) -> dict:
    """Measures the tests that pytest collects with these arguments, and returns the report.

    Args:
        arguments: command-line arguments of pytest.
        out: folder; pytest's output goes to its logs/pytest.txt.
        budget: seconds after which the remaining tests are skipped.

    Raises:
        SystemExit: pytest could not collect any test.
    """
    log_path, end, progress = out / "logs" / "pytest.txt", time.monotonic() + budget, Progress()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w") as log, progress.bar:
        try:
            while progress.head is None or progress.left():
                reason, code = run_child(arguments, log, progress, end)
                if progress.head is None:
                    sys.exit(f"pytest measured nothing ({reason}), see {log_path}")
                left = progress.left()
                if time.monotonic() > end + GRACE:
                    progress.give_up(left, "skipped", OUT_OF_BUDGET)
                elif left:
                    case = progress.cases[left[0]][0]
                    same = [test for test in left if progress.cases[test][0] == case]
                    progress.give_up(same if progress.collected else left, "failed", reason)
        except KeyboardInterrupt:
            if progress.head is None:
                raise
            progress.give_up(progress.left(), "failed", "interrupted")
            code = 0
    report = report_of(progress)
    if code == 1 and not any(entry["outcome"] == "failed" for entry in report["not_measured"]):
        entry = {"test": "collection", "case": "", "variant": "the tests", "outcome": "failed"}
        report["not_measured"].append(entry | {"reason": f"a file did not load, see {log_path}"})
    return report


def of_rows(lines: list[dict]) -> dict:
    """The report of rows that one or several runs of pytest wrote, of which some may have ended
    early. Rows of other programs are left out.

    Raises:
        SystemExit: there are no others.
    """
    progress = Progress()
    lines = [line for line in lines if "tests" in line or "test" in line]
    heads = [line for line in lines if "tests" in line]
    if not heads:
        sys.exit("none of the rows is of pytest's --rows")
    tests = [test for head in heads for test in head["tests"]]
    progress.add(heads[0] | {"tests": tests})
    for line in lines:
        if "tests" not in line:
            progress.add(line)
    progress.give_up(progress.left(), "skipped", OUT_OF_BUDGET)
    progress.bar.close()
    return report_of(progress)


def run_child(arguments: list[str], log, progress: Progress, end: float) -> tuple[str, int]:
    """Runs the remaining tests in a child until it ends or has to be killed.

    Returns the reason why it ended, and its exit code.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        progress.collected = False
        command = [sys.executable, "-m", "pytest", *arguments, "--benchmark-only", "-q"]
        command += ["--continue-on-collection-errors", "--rows", str(path)]
        command += [f"--deselect={test}" for test in progress.lines]
        command += [f"--budget={max(0, end - time.monotonic())}"] if end < math.inf else []
        log.flush()
        # In its own process group, so that torch's compile workers are killed with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            for line in follow(process, path, end + GRACE):
                if any(text in line.get("reason", "") for text in FATAL):
                    progress.add(line)
                    return f"after {line['reason']}", 0
                progress.add(line)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            code = process.wait()
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the process died: {name}", code


def follow(process: subprocess.Popen, path: Path, end: float):
    """The JSON lines that a process writes to a file, until it ends or the time is `end`."""
    with path.open() as file:
        text, ended = "", False
        while not ended and time.monotonic() < end:
            ended = process.poll() is not None
            *lines, text = (text + file.read()).split("\n")
            yield from map(json.loads, lines)
            time.sleep(0 if ended else 0.1)


def split(tests: list[str]) -> dict[str, tuple[str, str]]:
    """Test -> the prefix that all tests of its case share, and its variant.

    Every case has a variant "eager", from which the prefixes are taken.
    """
    cases = [test.removesuffix("eager]") for test in tests if test.endswith("-eager]")]
    found = {}
    for test in tests:
        case = max((case for case in cases if test.startswith(case)), key=len, default=test)
        found[test] = case, test.removeprefix(case).removesuffix("]")
    return found


def case_name(prefix: str) -> str:
    """Op and shape of a case, from the prefix of its tests."""
    parts = re.fullmatch(r".*?bench_(\w+)\.py::\w+\[(.*)-", prefix)
    return " ".join(parts.groups()) if parts else prefix


def report_of(progress: Progress) -> dict:
    """The report in pytest-benchmark's format, from the lines so far."""
    lines, rows, others = progress.lines.values(), [], []
    for line in lines:
        if "row" in line:
            rows.append(line["row"])
        elif line["outcome"] != "passed":
            case, variant = progress.cases[line["test"]]
            reason = line.get("reason", "")
            line["reason"] = OUT_OF_BUDGET if "--budget" in reason else reason
            others.append(line | {"case": case_name(case), "variant": variant})
    machine = progress.head["machine"]
    return {
        "machine_info": machine,
        "commit_info": {"id": machine.get("commit")},
        "benchmarks": rows,
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": pytest_benchmark.__version__,
        "device": progress.head["device"],
        "not_measured": others,
    }


def write(report: dict, out: Path) -> None:
    """Writes report.json, report.csv, report.md and the plots that have rows."""
    out.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in report["benchmarks"])
    rest = json.dumps({name: z for name, z in report.items() if name != "benchmarks"}, indent=1)
    put(out / "report.json", f'{rest[:-2]},\n "benchmarks": [\n{rows}\n]}}\n')
    put(out / "report.csv", csv_text(report))
    put(out / "report.md", markdown(report, plots.draw_all(report, out)))


def put(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    replace(path, lambda file: file.write_text(text))


if __name__ == "__main__":
    sys.exit(main())
