"""Small kernels that keep or break a rule, by name, and what the host says of them."""

import ctypes
from functools import cache
from pathlib import Path

from cuda_host.build import CSRC, build


@cache
def library(source):
    found = ctypes.CDLL(str(build([Path(__file__).with_name(source)], CSRC)))
    found.cuda_host_try.restype = ctypes.c_char_p
    return found


def run(source, rule):
    """Run the kernel of a rule in a source file of this folder.

    Raises:
        RuntimeError: what the host reports.
    """
    if error := library(source).cuda_host_try(rule.encode()).decode():
        assert error.startswith("rule, block (")
        raise RuntimeError(error)
