"""JSON lines that survive the process that writes them."""

import json
import os
from pathlib import Path


def append(path: Path, row: dict) -> None:
    """The row is on the disk when this returns, and in place of a row that was cut off."""
    with open(path, "a+b") as file:
        file.truncate(_end(file))
        file.write((json.dumps(row, default=str) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """All rows but a last one that its process did not live to finish."""
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def _end(file) -> int:
    """Where the last whole row ends."""
    size = file.seek(0, os.SEEK_END)
    if size == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1
