"""Training runs that can be stopped and continued."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lumina_kernels.output import replace


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, decay: str) -> float:
    """Rate of step number `step`, counted from 0: a linear rise over `warmup` steps, then "cosine"
    to 0 at step number `steps`, or "constant"."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    if decay == "constant":
        return peak * rise
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM fills, for a stop between two steps."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield received
        return

    def note(number: int, _frame) -> None:
        received.append(number)
        signal.signal(number, old[number])

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def plot_losses(losses: list[float], path: Path) -> None:
    """Draw the curve of the losses; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:  # part of the extra "train"; the losses themselves are in the saved state
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    window = max(1, len(losses) // 200)
    count = len(losses) // window
    means = torch.tensor(losses[: count * window]).reshape(count, window).mean(1)
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.semilogy([(i + 1) * window for i in range(count)], means.tolist())
    axes.set(xlabel="step", ylabel=f"flow-matching loss, mean of {window} steps")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    replace(path, lambda file: figure.savefig(file, format="png", dpi=100))
    plt.close(figure)
