"""The command line: `python -m lumina COMMAND`, or `lumina COMMAND` where it is installed.

Nothing heavy is imported before `main`, so that it hears Ctrl-C while PyTorch loads.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path

# What the person who typed the command can change. Other errors of the system, a full disk for one,
# are no fault of the arguments.
AT_FAULT = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors are one line on stderr.

    Returns:
        0: done; 1: the work failed; 2: the arguments are at fault; 130: interrupted by Ctrl-C.

    Raises:
        SystemExit: from argparse, with 0 after --help and --version, with 2 after a bad argument.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    name = "lumina" if Path(sys.argv[0]).stem == "lumina" else "python -m lumina"
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(name, f"warning: {message}")
        try:
            try:
                from lumina.cli.arguments import build_parser

                args = build_parser(name).parse_args(argv)
                name = f"{name} {args.command}"
                args.run(args)
            finally:
                if sys.stdout:  # here a full disk or a closed pipe still is one line
                    sys.stdout.flush()
        except KeyboardInterrupt:
            _say(name, "interrupted")
            return 130
        except BrokenPipeError:  # the reader, such as head, has seen enough
            _drop_stdout()
            return 1
        except Exception as error:
            _drop_stdout()
            _say(name, f"error: {_one_line(error)}")
            return 2 if isinstance(error, AT_FAULT) else 1
    return 0


def _say(name: str, text: str) -> None:
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = str(error).partition("\nException raised from")[0]  # a trace of PyTorch's C++
    known = (ValueError, TypeError, OSError, RuntimeError)
    return text if isinstance(error, known) and text else f"{type(error).__name__}: {text}"


def _drop_stdout() -> None:
    """Forget what stdout could not take, or Python says so again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
