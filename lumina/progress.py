"""Progress of long work: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines


def progress(total: int | None, what: str, *, done: int = 0, shown: bool = True):
    """A context that `update(n)` and `set_postfix(name=value)` move, on stderr.

    Args:
        total: of the units; None where nobody knows.
        what: is being done, for the reader.
        done: units of an earlier run.
        shown: False shows nothing.
    """
    if not shown or sys.stderr.isatty():
        return _Bar(total=total, initial=done, desc=what, disable=not shown)
    return _Lines(total, what, done)


class _Bar(tqdm):
    def update(self, n: float | None = 1) -> None:
        """As tqdm, but without a result, which a callback would hand on."""
        super().update(n)


class _Lines:
    """Stands in for tqdm where its carriage returns would make one endless line."""

    def __init__(self, total: int | None, what: str, done: int):
        self.total, self.what, self.first, self.done, self.figures = total, what, done, done, ""
        self.start = self.last = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last < EVERY:
            return
        self.last = now
        of = left = ""
        if self.total is not None:
            seconds = (now - self.start) / (self.done - self.first) * (self.total - self.done)
            of, left = f" of {self.total}", f", about {seconds:.0f} s left"
        print(f"{self.what}: {self.done}{of}{self.figures}{left}", file=sys.stderr, flush=True)

    def set_postfix(self, refresh: bool = False, **figures) -> None:
        self.figures = "".join(f", {name} {value}" for name, value in figures.items())
