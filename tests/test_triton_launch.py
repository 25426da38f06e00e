"""Launches from our dictionary of compiled kernels, which must be those that Triton would make."""

from common import run_compiling

# Per call: launches, how many of them were Triton's own, and kernels compiled for them.
CODE = """
import torch
from triton import knobs
from triton.runtime import JITFunction
from lumina_kernels import aot, gelu

taken, run = [], JITFunction.run
JITFunction.run = lambda *args, **kwargs: taken.append(1) or run(*args, **kwargs)
given = []

def kind(x):
    return tuple(map(kind, x)) if isinstance(x, tuple) else type(x) if torch.is_tensor(x) else x

def call(x, approximate="none"):
    with torch.no_grad():
        gelu(x, approximate, backend="triton")
    print(len(launches), len(taken), len(compiled))
    kernel, programs, arguments = launches[-1]
    given.append((kernel, programs, *map(kind, arguments[3:])))  # after Triton's hooks
    for found in (launches, taken, compiled):
        found.clear()

with aot.offline(90) as (compiled, launches):
    x = torch.zeros(33, 64, dtype=torch.bfloat16)
    call(x)
    call(x.clone())
    assert given[0] == given[1]
    call(x[1:])  # another size, of one variant
    call(x.flatten()[1:2049])  # an address that 16 does not divide
    call(x.flatten()[1:2049])
    call(x.float())
    call(x, "tanh")
    call(x)
    assert given[0] == given[-1]
    hook = lambda *args: None
    knobs.runtime.launch_enter_hook.add(hook)
    call(x)
    knobs.runtime.launch_enter_hook.remove(hook)
    call(x)
"""


def test_a_kernel_is_found_again_for_the_same_kind_of_arguments():
    done = run_compiling("-c", CODE)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    ours, theirs, new = (1, 0, 0), (1, 1, 0), (1, 1, 1)
    assert found == [new, ours, ours, new, ours, new, new, ours, theirs, ours], done.stderr
