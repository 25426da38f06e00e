"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


def check_output(path: Path) -> None:
    """Refuse a path that `replace` could not write, before the work that makes its content.

    Raises:
        ValueError: it is neither a file, a new name, a character device nor a FIFO.
        OSError: its folder is not one, or nothing can be written there.
    """
    if _is_stream(path):
        return
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: nothing can be written in {folder}")


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, flush it to disk, and only then rename it.

    Links are followed. A character device or FIFO keeps its place: it gets the bytes. Folders on
    the way are made.

    Args:
        path: a file, a new name, a character device or a FIFO.
        write: called with the name of an empty file that it may open, or replace, as it likes.

    Raises:
        ValueError: `path` is something else.
        OSError: from the system. What was at `path` is still there.
    """
    if _is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "whole"  # many formats are written by seeking, which streams lack
            write(file)
            with open(file, "rb") as source, open(path, "wb") as stream:
                shutil.copyfileobj(source, stream)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any new file; safetensors leaves 0600
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """Whether it is there and takes bytes in its place; False for a file and a new name."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return True
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "socket" if stat.S_ISSOCK(mode) else "disk"
        raise ValueError(f"{path} is a {kind}, it must be a file or a new name")
    return False
