"""With LUMINA_KERNELS_AUTOTUNE=1 a launcher searches for its configuration instead of a table."""

import math
import os
from collections.abc import Callable, Iterable

from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

AUTOTUNE = os.environ.get("LUMINA_KERNELS_AUTOTUNE") == "1"

# What was found in this process.
_found: dict[tuple, dict] = {}


def fastest(
    key: tuple, config: dict, changes: Iterable[dict], launch: Callable[[dict], None]
) -> dict:
    """`config`, or with LUMINA_KERNELS_AUTOTUNE=1 the fastest of it and its `changes`, each of them
    launched for some milliseconds when `key` is first seen. That waits for the GPU: search before a
    CUDA graph is recorded. `launch` must give the same result again."""
    if not AUTOTUNE:
        return config
    if key not in _found:
        candidates = [config, *(config | change for change in changes)]
        _found[key] = min(candidates, key=lambda candidate: _milliseconds(launch, candidate))
    return _found[key]


def _milliseconds(launch: Callable[[dict], None], config: dict) -> float:
    try:
        return do_bench(lambda: launch(config), return_mode="median")
    except OutOfResources:  # more shared memory than there is
        return math.inf


def magnitude(n: int) -> int:
    """Sizes that share a configuration: those of one power of two."""
    return n.bit_length()
