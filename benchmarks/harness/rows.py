"""JSON lines that survive the process that writes them."""

import json
import os
from pathlib import Path


def append(path: Path, row: dict) -> None:
    """The row is on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """All rows but a last one that its process did not live to finish."""
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]
