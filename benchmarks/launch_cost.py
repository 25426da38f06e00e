"""Host time of one eager call of every op: python -m benchmarks.launch_cost [--backend cpu]

No GPU is needed for Triton: a call goes through the op's checks, PyTorch's dispatcher, allocation
and our launcher to a driver that launches nothing. On a GPU, add the launch by the real driver, a
few microseconds; its allocator replaces the CPU's. With the backend "cpu" the tensors are of 4
tokens, and the kernel's own time is in the figure.

A figure is the time that nine in ten calls take longer than, so that it is the call's own also on
a busy machine. In the last column autograd records the call; there is no figure where the kernel
has no gradient. The first row is the floor: an op of `torch.library` with six tensors as arguments
whose Python function returns two new ones.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

import lumina_kernels
from benchmarks.harness.memory import keep_freed_memory
from lumina_kernels import aot
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS

SIZES = {
    # Those of the 2B model for pictures of 256 x 256 pixels.
    "triton": Sizes(B=2, grid=(1, 16, 16), T=32, H=32, G=8, K=72, F=6144, dtype=torch.bfloat16),
    "cpu": Sizes(B=1, grid=(1, 2, 2), T=4, H=4, G=2, K=16, F=64),
}
_LIBRARY = torch.library.Library("lumina_benchmarks", "FRAGMENT")


def call_of(op: str, backend: str = "triton") -> partial:
    """The op on the example that a model would call it with."""
    arguments = next(iter(examples(op, SIZES[backend]).values()))
    return partial(getattr(lumina_kernels, op), **arguments, backend=backend)


def recorded(call: partial) -> Callable:
    """The same call with a gradient required for the first tensor."""
    name, value = next(iter(call.keywords.items()))
    return partial(call, **{name: value.detach().requires_grad_()})


def empty_op() -> Callable:
    """A call of an op that does nothing."""
    _LIBRARY.define(
        "empty(Tensor a, Tensor b, Tensor? c, Tensor? d, Tensor? e, Tensor? f, float eps, "
        "str backend) -> (Tensor, Tensor)"
    )
    _LIBRARY.impl(
        "empty", lambda a, *_: (torch.empty_like(a), a.new_empty(3)), "CompositeExplicitAutograd"
    )
    x = torch.zeros(2, 3)
    return partial(torch.ops.lumina_benchmarks.empty.default, x, x, x, x, x, x, 1e-5, "cpu")


def microseconds(call: Callable, repeats: int, launches: list) -> float:
    """The first decile. `launches` are forgotten, with the results that they hold."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        launches.clear()
    return 1e6 * sorted(times)[repeats // 10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--backend", choices=SIZES, default="triton")
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args()
    keep_freed_memory()
    offline = aot.offline(90) if options.backend == "triton" else nullcontext(([], []))
    with offline as (_, launches):

        def time_of(call):
            return f"{microseconds(call, options.repeats, launches):.1f}"

        print(f"{'op':22}{'us':>7}{'with autograd':>15}")
        with torch.no_grad():
            print(f"{'(does nothing)':22}{time_of(empty_op()):>7}{'-':>15}")
        for op in OPS:
            call = call_of(op, options.backend)
            call()  # compiles
            with torch.no_grad():
                print(f"{op:22}{time_of(call):>7}", end="")
            try:
                print(f"{time_of(recorded(call)):>15}", flush=True)
            except NotImplementedError:
                print(f"{'-':>15}")


if __name__ == "__main__":
    main()
