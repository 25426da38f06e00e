"""LUMINA_KERNELS_AUTOTUNE=1: a launcher measures configurations instead of trusting its table."""

import math
import os
from collections.abc import Callable, Iterable

from triton.testing import do_bench

AUTOTUNE = os.environ.get("LUMINA_KERNELS_AUTOTUNE") == "1"

# The fastest configurations found in this process.
_found: dict[tuple, dict] = {}


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
