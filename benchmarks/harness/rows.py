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


def with_machines(path: Path) -> list[dict]:
    """The rows, each with the "machine" that the last row before it with one names."""
    rows, machine = [], {}
    for row in read(path):
        machine = row.get("machine", machine)
        rows.append(row | {"machine": machine})
    return rows


def _end(file) -> int:
    """Where the last whole row ends."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() in (b"", b"\n"):
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1
