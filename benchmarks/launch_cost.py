"""Host time of one eager call of every op on the Triton backend: python -m benchmarks.launch_cost

No GPU is needed: a call goes through the op's checks, PyTorch's dispatcher, allocation and Triton's
launcher to a driver that launches nothing. On a GPU, add the launch by the real driver, a few
microseconds; its allocator replaces the CPU's. Times are medians. In the last column autograd
records the call; there is no figure where the kernel has no gradient.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import lumina_kernels
from lumina_kernels import aot
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS

# Those of the 2B model for pictures of 256 x 256 pixels.
SIZES = Sizes(B=2, grid=(1, 16, 16), T=32, H=32, G=8, K=72, F=6144, dtype=torch.bfloat16)


def call_of(op: str) -> Callable:
    """The op on the example that a model would call it with."""
    arguments = next(iter(examples(op, SIZES).values()))
    return partial(getattr(lumina_kernels, op), **arguments, backend="triton")


def recorded(call: partial) -> Callable:
    """The same call with a gradient required for the first tensor."""
    name, value = next(iter(call.keywords.items()))
    return partial(call, **{name: value.detach().requires_grad_()})


def median_us(call: Callable, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--repeats", type=int, default=1000)
    repeats = parser.parse_args().repeats
    print(f"{'op':22}{'us':>7}{'with autograd':>15}")
    with aot.offline(90):
        for op in OPS:
            call = call_of(op)
            call()  # compiles
            with torch.no_grad():
                print(f"{op:22}{median_us(call, repeats):7.1f}", end="")
            try:
                print(f"{median_us(recorded(call), repeats):15.1f}")
            except NotImplementedError:
                print(f"{'-':>15}")


if __name__ == "__main__":
    main()
