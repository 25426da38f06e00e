"""Configurations of kernels: those measured on such a GPU (`lumina_kernels.measured`),
and, with LUMINA_KERNELS_AUTOTUNE=1, those that a launcher measures itself.
"""

import math
import os
from collections.abc import Callable, Iterable
from functools import cache

from torch import Tensor
from triton.runtime import driver
from triton.testing import do_bench

from lumina_kernels.backend import EMULATED
from lumina_kernels.measured import configuration

AUTOTUNE = os.environ.get("LUMINA_KERNELS_AUTOTUNE") == "1"

# The fastest configurations found in this process.
_found: dict[tuple, dict] = {}

# Options with what was measured: a launcher gets the same dictionary every time (`_launch`).
_changed: dict[tuple[int, int], tuple[dict, dict]] = {}


def current_arch() -> int:
    """Compute capability of the current GPU, 90 for 9.0; 0 for the interpreter."""
    return 0 if "triton" in EMULATED else _arch_of(driver.active.get_current_device())


@cache
def _arch_of(device: int) -> int:
    return driver.active.get_current_target().arch


def programs_at_once(options: dict) -> int:
    """Programs with such options, maxnreg among them, that the current GPU runs at a time by their
    registers; 2 in the interpreter, so that they have several rows each."""
    if "triton" in EMULATED:
        return 2
    of_a_processor = 65536 // (32 * options["num_warps"] * options["maxnreg"])
    return max(1, of_a_processor) * _property("multiprocessor_count")


def loop_stages(loaded: int) -> int:
    """2, for a loop that loads so many bytes a pass and has them come into shared memory while it
    works on the pass before; 1 where shared memory would not hold those of two programs."""
    if "triton" in EMULATED:
        return 2
    return 2 if 2 * loaded <= _property("max_shared_mem") else 1


def _property(name: str) -> int:
    """Of the current GPU, by Triton's name; `max_shared_mem` is the bytes that a block may have."""
    return _properties_of(driver.active.get_current_device())[name]


@cache
def _properties_of(device: int) -> dict[str, int]:
    return driver.active.utils.get_device_properties(device)


def tuned(kernel: str, size: int, x: Tensor, options: dict) -> dict:
    """The options, a dictionary that its caller keeps, with what was measured of the kernel on this
    GPU, for values as those of x."""
    changes = configuration(current_arch(), kernel, size, x.itemsize)
    if not changes:
        return options
    key = id(options), id(changes)  # both are kept, so that no other has their id
    if key not in _changed:
        _changed[key] = options | changes, options, changes
    return _changed[key][0]


def fastest(
    key: tuple, config: dict, changes: Iterable[dict], launch: Callable[[dict], None]
) -> dict:
    """`config`, or with LUMINA_KERNELS_AUTOTUNE=1 the fastest of it and its variants, `changes`.

    Each is launched for some milliseconds when `key` is first seen. That waits for the GPU, so
    search before a CUDA graph is recorded. `launch` must be repeatable. A candidate that fails is
    left out, and if all do, `config` is launched again, by the caller, and raises."""
    if not AUTOTUNE:
        return config
    if key not in _found:
        candidates = [config, *(config | change for change in changes)]
        _found[key] = min(candidates, key=lambda candidate: _milliseconds(launch, candidate))
    return _found[key]


def _milliseconds(launch: Callable[[dict], None], config: dict) -> float:
    try:
        return do_bench(lambda: launch(config), return_mode="median")
    except Exception:  # too much shared memory, or one of the compiler's many own errors
        return math.inf


def magnitude(n: int) -> int:
    """Sizes up to the next power of two share a configuration."""
    return n.bit_length()
