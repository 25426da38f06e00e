"""The plots of a report. A plot is None if the report has no rows for it."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from benchmarks.harness.tables import exponent, forward_curves, machine_name, main_rows, median
from lumina_kernels.output import replace

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "lumina-cpu": "#0072B2", "lumina-triton": "#0072B2", "lumina-cuda": "#56B4E9",
    "lumina-drop2": "#009E73", "eager": "#7F7F7F", "compile": "#E69F00",
    "compile-max-autotune": "#D55E00", "peers": "#CC79A7",
}  # fmt: skip
MARKERS = "osD^vPX*<>"
WIDTH = 9.6  # inches of 100 pixels
STYLE = {"font.size": 10, "axes.grid": True, "axes.grid.which": "both", "grid.alpha": 0.3,
         "axes.axisbelow": True,
         "axes.titlesize": 10, "legend.fontsize": 9}  # fmt: skip


def draw_all(report: dict, out: Path) -> list[str]:
    """Writes the plots that the report has rows for, and returns their file names."""
    drawn = []
    for plot in (speedup, roofline, cost, memory, quality):
        path = out / f"{plot.__name__}.png"
        with plt.rc_context(STYLE):
            figure = plot(report)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            replace(path, lambda file, figure=figure: figure.savefig(file, format="png", dpi=100))
            plt.close(figure)
        drawn.append(path.name)
    return drawn


def colour_key(variant: str) -> str:
    """The key of a variant in COLOURS."""
    return variant if variant in COLOURS else "peers"


def colour(variant: str) -> str:
    return COLOURS[colour_key(variant)]


def op_labels(ops: dict[str, list[dict]]) -> tuple[str, list[str]]:
    """The most common shape, and the labels of the ops, which name the shape if it is another."""
    shapes = {op: rows[0]["extra_info"]["shape"] for op, rows in ops.items()}
    usual = statistics.mode(shapes.values())
    return usual, [op if shape == usual else f"{op}\n{shape}" for op, shape in shapes.items()]


def plain_numbers(*axes) -> None:
    """Plain numbers on logarithmic axes instead of powers of ten."""
    for axis in axes:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")


def swatches(kinds: set[str]) -> list[Line2D]:
    """Legend entries of the colours."""
    return [legend_marker("s", name, color) for name, color in COLOURS.items() if name in kinds]


def legend_marker(marker: str, label: str, color: str = "black", **style) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, label=label, color=color, **style)


def speedup(report: dict) -> Figure | None:
    ops = {}
    for op, rows in main_rows(report).items():
        infos = [row["extra_info"] for row in rows if row["extra_info"]["variant"] != "eager"]
        speeds = {info["variant"]: info.get("x eager") for info in infos}
        bars = {variant: speed for variant, speed in speeds.items() if speed is not None}
        ops |= {op: bars} if bars else {}
    if not ops:
        return None
    usual, labels = op_labels({op: main_rows(report)[op] for op in ops})
    height = 1.6 + 0.2 * sum(len(bars) + 0.8 for bars in ops.values())
    figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    y, middles = 0.0, []
    for bars in ops.values():
        middles.append(y + (len(bars) - 1) / 2)
        for variant, value in bars.items():
            axes.barh(y, value - 1, left=1, height=0.9, color=colour(variant))
            text = f"{value:.2f}" if variant in COLOURS else f"{value:.2f} {variant}"
            side = 1 if value >= 1 else -1
            axes.annotate(
                text, (value, y), (3 * side, 0), textcoords="offset points", fontsize=9,
                va="center", ha="left" if side > 0 else "right",
            )  # fmt: skip
            y += 1
        y += 0.8
    values = [1, *(value for bars in ops.values() for value in bars.values())]
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    # Room for the names of packages at both ends.
    axes.set(xlim=(min(values) / 3, max(values) * 2), ylim=(y - 0.8, -1))
    axes.set(xlabel="times as fast as eager PyTorch", title=f"{usual}, {machine_name(report)}")
    axes.set_yticks(middles, labels)
    axes.grid(False, axis="y")
    kinds = {colour_key(variant) for bars in ops.values() for variant in bars}
    figure.legend(handles=swatches(kinds), loc="outside lower center", ncols=6)
    return figure


def roofline(report: dict) -> Figure | None:
    """Memory-bound ops as shares of the copy rate; ops with matrix products in a roofline."""
    moving, counting, ops = {}, [], main_rows(report)
    for op, rows in ops.items():
        infos = [row["extra_info"] for row in rows]
        with_flops = [info for info in infos if info.get("flops") is not None]
        counting += with_flops
        if not with_flops and any(info.get("of clone") is not None for info in infos):
            moving[op] = rows
    if not moving and not counting:
        return None
    figure, panels = plt.subplots(
        1, bool(moving) + bool(counting), figsize=(WIDTH, 5.8), layout="constrained", squeeze=False
    )
    shown = [*counting, *(row["extra_info"] for rows in moving.values() for row in rows)]
    handles = swatches({colour_key(info["variant"]) for info in shown})
    if moving:
        copy_panel(panels[0, 0], moving)
    if counting:
        handles += flops_panel(panels[0, -1], report, counting)
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.suptitle(f"Against the limits of {machine_name(report)}")
    return figure


def copy_panel(axes, ops: dict[str, list[dict]]) -> None:
    usual, labels = op_labels(ops)
    for place, rows in enumerate(ops.values()):
        infos = [row["extra_info"] for row in rows]
        infos = [info for info in infos if info.get("of clone") is not None]
        for i, info in enumerate(infos):
            y = place + 0.6 * ((i + 0.5) / len(infos) - 0.5)
            axes.scatter(100 * info["of clone"], y, 36, colour(info["variant"]), zorder=3)
    axes.axvline(100, color="black", linewidth=1.2)
    axes.set_yticks(range(len(ops)), labels)
    axes.set(ylim=(len(ops) - 0.5, -0.5), xlabel="GB/s, % of a copy of as many bytes")
    axes.set_xlim(left=0)
    axes.set_title(f"Memory-bound: {usual}")


def flops_panel(axes, report: dict, infos: list[dict]) -> list[Line2D]:
    """Draws the roofline, ops whose bytes are not counted at the right edge. Returns the legend's
    entries for the ops."""
    dtype = statistics.mode(info["dtype"] for info in infos)
    infos = [info for info in infos if info["dtype"] == dtype]
    matmul = max(info["matmul TFLOP/s"] for info in infos)
    # The rate of the largest copy, as a small one stays in the caches.
    copies = [row["extra_info"] for row in report["benchmarks"]]
    copies = [
        (info["bytes"], info["clone GB/s"]) for info in copies if info.get("clone GB/s") is not None
    ]
    ceiling, label = [], f"matmul {matmul:.3g} TFLOP/s"
    counted = [info for info in infos if info.get("bytes") is not None]
    work = {info["op"]: info["flops"] / info["bytes"] for info in counted}
    x = [*work.values()] or [1]
    if copies:
        copy = max(copies)[1]
        x.append(1e3 * matmul / copy)
        ceiling = [(min(x) / 8, min(x) / 8 * copy / 1e3), (x[-1], matmul)]
        label = f"copy {copy:.3g} GB/s, {label}"
    right = 4 * max(x)
    axes.plot(*zip(*ceiling, (right, matmul), strict=True), color="black", linewidth=1.2)
    ops = dict(zip(dict.fromkeys(info["op"] for info in infos), MARKERS, strict=False))
    for info in infos:
        axes.scatter(
            work.get(info["op"], right / 1.3), info["TFLOP/s"], 60,
            colour(info["variant"]), marker=ops[info["op"]], edgecolors="white", zorder=3,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    plain_numbers(axes.yaxis)
    axes.set_title(f"With matrix products: {dtype}")
    names = {op: op if op in work else f"{op} (bytes not counted)" for op in ops}
    handles = [legend_marker(marker, names[op]) for op, marker in ops.items()]
    return [*handles, Line2D([], [], color="black", label=label)]


def over_length(report: dict, value: str, label: str, slopes: bool) -> Figure | None:
    """A figure of the whole forward against L, for the model measured at the most lengths."""
    models, lengths, model = forward_curves(report["benchmarks"]), [], ""
    for name, variants in models.items():
        found = sorted({point.L for points in variants.values() for point in points})
        if len(found) > max(1, len(lengths)):
            model, lengths = name, found
    if not lengths:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 5.6), layout="constrained")
    for marker, (variant, points) in zip(MARKERS, models[model].items(), strict=False):
        slope = f", L^{exponent(points):.2f}" if slopes and len(points) > 1 else ""
        axes.plot(
            [z.L for z in points], [getattr(z, value) for z in points], marker=marker,
            color=colour(variant), label=variant + slope,
            # Dashed, as it takes as much memory as the variant without context drop.
            linestyle=(0, (6, 9)) if variant == "lumina-drop2" else "-",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="L, tokens", ylabel=label)
    plain_numbers(axes.yaxis)
    axes.set_xticks(lengths, lengths)
    axes.set_xticks([], minor=True)
    axes.legend()
    axes.set_title(f"A whole forward, {model}, {machine_name(report)}")
    return figure


def cost(report: dict) -> Figure | None:
    return over_length(report, "seconds", "seconds", slopes=True)


def memory(report: dict) -> Figure | None:
    return over_length(report, "mib", "peak MiB, besides inputs and weights", slopes=False)


def quality(report: dict) -> Figure | None:
    rows = [row for row in report["benchmarks"] if row["extra_info"].get("error") is not None]
    if not rows:
        return None
    group = statistics.mode(row["group"] for row in rows)
    rows = [row for row in rows if row["group"] == group]
    solvers, schedules = (
        dict(zip(dict.fromkeys(row["extra_info"][name] for row in rows), signs, strict=False))
        for name, signs in (("solver", list(COLOURS.values())[1:]), ("schedule", MARKERS))
    )
    figure, axes = plt.subplots(figsize=(WIDTH, 6), layout="constrained")
    front = []
    for row in sorted(rows, key=median):
        info, point = row["extra_info"], (median(row), row["extra_info"]["error"])
        edge = solvers[info["solver"]]
        axes.scatter(
            *point, 60, marker=schedules[info["schedule"]], edgecolors=edge, linewidths=1.5,
            facecolors="none" if info.get("context_drop") else edge, zorder=3,
        )  # fmt: skip
        if not front or point[1] < front[-1][1]:
            front.append(point)
            style = {"textcoords": "offset points", "ha": "right", "fontsize": 9}
            axes.annotate(info["nfe"], point, (-7, -13), **style)
    axes.plot(*zip(*front, strict=True), color="black", linewidth=1)
    line = Line2D([], [], color="black", label="best error for its time, with its NFE")
    handles = [legend_marker("s", name, color) for name, color in solvers.items()]
    handles += [legend_marker(marker, name) for name, marker in schedules.items()]
    handles += [legend_marker("o", "with context drop", markerfacecolor="none")]
    axes.legend(handles=[line, *handles])
    axes.set(xscale="log", yscale="log", xlabel="seconds of a call")
    axes.set(ylabel="RMS error against the exact solution")
    axes.set(title=f"Sampling, {rows[0]['extra_info']['shape']}, {machine_name(report)}")
    plain_numbers(axes.xaxis, axes.yaxis)
    return figure
