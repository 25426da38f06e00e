"""Memory of the process under measurement: what a call allocates, and what the allocator keeps."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import torch


def peak_bytes(call: Callable, device: str) -> int:
    """The most bytes of tensors alive at once during a call, without those alive before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [z for z in profile.profiler.kineto_results.events() if z.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, as the allocators that PyTorch recommends for CPUs do.

    By default glibc may return large blocks to the system, depending on what the process allocated
    before. The next call then has its pages mapped again, which can take longer than the call
    itself. Other C libraries are left as they are.
    """
    mallopt = _c_function("mallopt")
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)


def release_freed_memory() -> None:
    """Return all freed memory to the system. Done between cases: the blocks that one case leaves
    may not fit what the next one needs."""
    gc.collect()
    trim = _c_function("malloc_trim")
    if trim:
        trim(0)


def _c_function(name: str) -> Callable | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None
