"""The report as Markdown and as CSV, from what `benchmarks/report.py` measured."""

import csv
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

OURS = ("lumina-cpu", "lumina-triton", "lumina-cuda")
OUT_OF_BUDGET = "the time budget of the report had run out"
HOW_TO_READ = """\
The variants of a case are measured in interleaved rounds. Times are medians over the rounds; in
brackets the spread, which is the interquartile range over the median. GB/s count the bytes that a
fused kernel has to move: every input is read once and every output written once, however the
variant does it. TFLOP/s count the useful FLOPs of the matrix products, without masked keys. "of
clone" and "of matmul" compare them with a copy of as many bytes and with a large matrix product,
measured in the same rounds; PyTorch's float32 matrix product is not a true ceiling on every CPU.
The inputs are not in any cache. The allocator keeps freed memory, because mapping pages again would
dominate many of the times, unless the line of the machine says that it is the default one. "x
eager" is the speed relative to eager PyTorch (for whole models relative to diffusers, where it is
installed), "x compile" relative to `torch.compile` of that. Peak MiB is the largest amount of
memory in tensors during a call, without its inputs."""


class Point(NamedTuple):
    L: int
    seconds: float
    mib: float


def median(row: dict) -> float:
    return row["stats"]["median"]


def machine_name(report: dict) -> str:
    machine = report["machine_info"]
    return machine.get("gpu") or f"{machine.get('processor')}, threads: {machine.get('threads')}"


def main_rows(report: dict) -> dict[str, list[dict]]:
    """Op -> the rows of its main shape: Lumina-Next's with the most tokens up to 4096 (1024 x 1024
    pixels), or that of another model where there is none."""
    ops = {}
    for row in report["benchmarks"]:
        info = row["extra_info"]
        if info["op"] != "sample" and not info["backward"]:
            ops.setdefault(info["op"], {}).setdefault(info["shape"], []).append(row)
    return {op: max(shapes.values(), key=importance) for op, shapes in ops.items()}


def importance(rows: list[dict]) -> tuple:
    info = rows[0]["extra_info"]
    return info["model"] == "lumina-next", info["L"] * (info["L"] <= 4096)


def csv_text(report: dict) -> str:
    """One line for each row, with the machine's columns first."""
    machine = report["machine_info"]
    about = {"machine": machine.get("processor")}
    about |= {name: machine.get(name) for name in ("gpu", "driver", "torch", "triton", "commit")}
    lines = []
    for row in report["benchmarks"]:
        info = {name: z for name, z in row["extra_info"].items() if not isinstance(z, list | dict)}
        times = {f"{name}, s": row["stats"][name] for name in ("median", "iqr", "min")}
        date = {"date": report["datetime"]}
        lines.append(about | date | info | times | {"rounds": row["stats"]["rounds"]})
    file = io.StringIO()
    writer = csv.DictWriter(file, dict.fromkeys(name for line in lines for name in line))
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def markdown(report: dict, pictures: list[str]) -> str:
    rows, machine = report["benchmarks"], report["machine_info"]
    lines = [f"# Speed of lumina-kernels on {machine_name(report)}", ""]
    known = [f"{name} {value}" for name, value in machine.items() if value is not None]
    lines += [", ".join(known) + "  ", f"{report['datetime']}, `{report.get('command', '')}`  "]
    missing = len(report["not_measured"])
    lines += [f"{len(rows)} rows measured, {missing} not measured (see the last section)."]
    lines += ["", HOW_TO_READ, ""]
    lines += [f"![{name}]({name})" for name in pictures]
    ops = dict.fromkeys(row["extra_info"]["op"] for row in rows)
    for op in ops:
        if op != "sample":
            chosen = [row for row in rows if row["extra_info"]["op"] == op]
            lines += ["", f"## {op}", "", *table(chosen, COLUMNS)]
    lines += ["", "## Where a peer is faster", "", *faster_peers(rows)]
    lines += ["", "## Forward time over the number of tokens", "", *scaling(rows)]
    samples = [row for row in rows if row["extra_info"].get("nfe") is not None]
    if samples:
        lines += ["", "## Sampling: time against error", "", *table(samples, SAMPLE_COLUMNS)]
    lines += ["", "## Not measured", "", *not_measured(report["not_measured"])]
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 1e-6)} us"


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def timing(row: dict) -> str:
    stats = row["stats"]
    return f"{duration(stats['median'])} ({stats['iqr'] / stats['median']:.0%})"


def figure(name: str, form: Callable = number, unless: str = ""):
    """A column of extra_info. It is empty where that has no value, or has one of `unless`."""

    def text(row):
        info = row["extra_info"]
        value = info.get(name) if info.get(unless) is None else None
        return "" if value is None else form(value)

    return text


COLUMNS = {
    "shape": figure("shape", str),
    "variant": figure("variant", str),
    "time (spread)": timing,
    "GB/s": figure("GB/s", unless="flops"),
    "of clone": figure("of clone", "{:.0%}".format, unless="flops"),
    "TFLOP/s": figure("TFLOP/s"),
    "of matmul": figure("of matmul", "{:.0%}".format),
    "peak MiB": figure("peak MiB"),
    "x eager": figure("x eager", "{:.2f}".format),
    "x compile": figure("x compile", "{:.2f}".format),
}
SAMPLE_COLUMNS = {
    "shape": figure("shape", str),
    "solver": figure("solver", str),
    "schedule": figure("schedule", str),
    "NFE": figure("nfe"),
    "context drop": lambda row: "yes" if row["extra_info"].get("context_drop") else "",
    "time (spread)": timing,
    "RMS error": figure("error"),
}


def table(rows: list[dict], columns: dict) -> list[str]:
    """A Markdown table of the columns that are not empty."""
    cells = {name: [text(row) for row in rows] for name, text in columns.items()}
    return grid({name: column for name, column in cells.items() if any(column)})


def grid(columns: dict[str, list[str]]) -> list[str]:
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def faster_peers(rows: list[dict]) -> list[str]:
    """The cases in which a peer is faster than the best of ours."""
    cases = {}
    for row in rows:
        if row["extra_info"]["op"] != "sample":
            cases.setdefault(row["group"], []).append(row)
    found = []
    for group, members in cases.items():
        ours = [row for row in members if row["extra_info"]["variant"] in OURS]
        best = min(ours, key=median, default=None)
        peers = [row for row in members if not row["extra_info"]["variant"].startswith("lumina-")]
        for row in peers:
            if best is not None and median(row) < median(best):
                found.append((median(best) / median(row), group, row, best))
    compared = f"{len(cases)} case{'s' * (len(cases) != 1)}"
    if not found:
        return [f"Nowhere, in {compared}."]
    found.sort(key=lambda entry: -entry[0])
    lost = len({group for _, group, _, _ in found})
    columns = {
        "case": [group for _, group, _, _ in found],
        "peer": [row["extra_info"]["variant"] + other_result(row, best) for *_, row, best in found],
        "its time (spread)": [timing(row) for _, _, row, _ in found],
        "our best": [f"{timing(z)}, {z['extra_info']['variant']}" for *_, z in found],
        "faster by": [f"{ratio - 1:.0%}" for ratio, _, _, _ in found],
    }
    return [f"In {lost} of {compared}:", "", *grid(columns)]


def other_result(row: dict, ours: dict) -> str:
    """A note on a variant that is not equivalent, for which no bytes or FLOPs are counted."""
    counted = [
        any(z["extra_info"].get(name) is not None for name in ("bytes", "flops"))
        for z in (row, ours)
    ]
    return "" if counted[0] == counted[1] else " (computes something else)"


def forward_curves(rows: list[dict]) -> dict[str, dict[str, list[Point]]]:
    """Model -> variant -> its points, by L."""
    curves = {}
    for row in rows:
        info = row["extra_info"]
        if info["op"] == "forward" and not info["backward"]:
            model = f"{info['model']}, {info['layers']} layers, {info['dtype']}"
            points = curves.setdefault(model, {}).setdefault(info["variant"], [])
            points.append(Point(info["L"], median(row), info["peak MiB"]))
            points.sort()
    return curves


def exponent(points: list[Point]) -> float:
    """Slope of log time against log L, by least squares."""
    return np.polyfit([math.log(z.L) for z in points], [math.log(z.seconds) for z in points], 1)[0]


def scaling(rows: list[dict]) -> list[str]:
    columns = {name: [] for name in ("model", "variant", "L", "exponent", "between the last two")}
    for model, curves in forward_curves(rows).items():
        for variant, points in curves.items():
            if len(points) > 1:
                lengths = ", ".join(str(point.L) for point in points)
                exponents = [exponent(points), exponent(points[-2:])]
                texts = [model, variant, lengths, *[f"{z:.2f}" for z in exponents]]
                for column, text in zip(columns.values(), texts, strict=True):
                    column.append(text)
    if not columns["model"]:
        return ["No model was measured at two lengths."]
    text = "Slope of log time against log L, by least squares: 1 is linear, 2 quadratic."
    return [text, "", *grid(columns)]


def not_measured(entries: list[dict]) -> list[str]:
    """Every reason, with the variants and cases that it concerns."""
    reasons = {}
    for entry in entries:
        reason = "**failed**: " * (entry["outcome"] == "failed") + entry["reason"]
        cases = reasons.setdefault(reason, {}).setdefault(entry["variant"], [])
        cases.append(entry["case"] or entry["test"])
    lines = []
    for reason, variants in reasons.items():
        if len(variants) > 3:
            every = [case for cases in variants.values() for case in cases]
            variants = {f"{len(every)} rows": list(dict.fromkeys(every))}
        concerned = "; ".join(f"{name} of {brief(cases)}" for name, cases in variants.items())
        lines.append(f"- {reason}: {concerned}")
    return lines or ["Everything was measured."]


def brief(cases: list[str]) -> str:
    """The cases, or their number and their ops where they are many."""
    ops = dict.fromkeys(case.split(" ")[0] for case in cases)
    return ", ".join(cases) if len(cases) <= 2 else f"{len(cases)} cases ({', '.join(ops)})"
