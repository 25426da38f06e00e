"""The forward of attention for Hopper by wgmma and TMA, which has to be asked for."""

from contextlib import contextmanager
from unittest import mock

import torch

HOPPER = "lumina-cuda-hopper"  # the variant of benchmarks


def is_there() -> bool:
    """Whether this GPU has it."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@contextmanager
def on_hopper():
    """The CUDA backend takes it; the kernels read the variable in every call."""
    with mock.patch.dict("os.environ", LUMINA_KERNELS_HOPPER="1"):
        yield
