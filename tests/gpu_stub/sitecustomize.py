"""A GPU that is not there: with this folder first in PYTHONPATH, every Python process finds one of
compute capability 9.0, whose tensors are on the CPU. Triton's kernels run in its interpreter, those
of CUDA are the C++ ones, a graph is the call itself, and whatever events time takes a millisecond.

For trying out programs that need a GPU, every line of them but what the GPU itself does. The model
that they measure is a small one in float16, as the interpreter has no bfloat16. Where CUDA_ERROR
names a file, it is deleted, and the next synchronisation fails, once.
"""

import os
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402


def on_cpu(value):
    """A device or the name of one; anything else is left as it is."""
    is_gpu = value == "cuda" if isinstance(value, str) else getattr(value, "type", None) == "cuda"
    return "cpu" if is_gpu else value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*[on_cpu(value) for value in args], **kwargs)


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, other) -> float:
        return random.uniform(0.9, 1.1)  # milliseconds


class Graph:
    """Replays nothing: what a graph computes was computed when it was recorded."""

    def replay(self):
        pass


class Stream:
    def wait_stream(self, other):
        pass


def synchronize(device=None):
    path = os.environ.get("CUDA_ERROR", "")
    if os.path.exists(path):
        os.remove(path)
        raise RuntimeError("CUDA error: of the stub")


PROPERTIES = SimpleNamespace(
    name="a stub", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
)
FAKES = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "synchronize": synchronize,
    "empty_cache": lambda: None,
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: nullcontext(),
    "graph": lambda graph: nullcontext(),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1 << 20,
    "reset_peak_memory_stats": lambda device=None: None,
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": Graph,
}
for name, fake in FAKES.items():
    setattr(torch.cuda, name, fake)
OnCpu().__enter__()

import interpreter  # noqa: E402

from benchmarks.harness import shapes, timing  # noqa: E402
from lumina_kernels import backend  # noqa: E402

timing.matmul_size, timing.SCRATCH, timing.MAX_GAP = lambda device: 16, 16, 16
timing.MAX_BATCHES["cuda"] = 1
interpreter.hasten()
shapes.LUMINA_NEXT = shapes.COMPACT.but(model="lumina-next", dtype="float16")

backend.MISSING.pop("cuda", None)
backend.DEVICES |= {"cuda": "cpu", "triton": "cpu"}
