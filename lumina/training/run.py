"""Training runs that can be stopped and continued."""

from __future__ import annotations

import importlib.util
import math
import signal
import threading
import time
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


class Log:
    """Loss, rate and speed of a run by step: `log.csv` with a line for every so many steps, and
    TensorBoard's files in `tensorboard/` where that is installed.

    Args:
        folder: of the run; None keeps no log.
        done: steps that the run has; later ones in the log were lost, and are taken again.
        every: steps between two lines.
    """

    HEAD = "step,loss,lr,pictures/s\n"

    def __init__(self, folder: Path | None, done: int, every: int = 10):
        self.folder, self.done, self.every, self.board = folder, done, every, None
        self.pictures, self.losses, self.start = 0, [], time.monotonic()

    def __enter__(self) -> Log:
        if self.folder is None:
            return self
        path, kept = self.folder / "log.csv", [self.HEAD]
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)[1:]
            kept += [line for line in lines if int(line.partition(",")[0]) <= self.done]
        replace(path, lambda file: file.write_text("".join(kept)))
        self.file = open(path, "a")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.done + 1)
        return self

    def __exit__(self, *_) -> None:
        if self.folder is None:
            return
        self.file.close()
        if self.board is not None:
            self.board.close()

    def step(self, number: int, pictures: int, loss: float, lr: float) -> None:
        """Step `number` was taken, from 1."""
        if self.folder is None:
            return
        self.pictures += pictures
        self.losses.append(loss)
        if number % self.every:
            return
        now = time.monotonic()
        loss, speed = sum(self.losses) / len(self.losses), self.pictures / (now - self.start)
        self.pictures, self.losses, self.start = 0, [], now
        self.file.write(f"{number},{loss:.6g},{lr:.6g},{speed:.4g}\n")
        self.file.flush()
        if self.board is not None:
            for name, value in (("loss", loss), ("lr", lr), ("pictures/s", speed)):
                self.board.add_scalar(name, value, number)


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
