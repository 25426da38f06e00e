"""Example calls of every op, from one place: for the tests of the contract, `aot` and benchmarks.

from lumina_kernels.examples import Sizes, examples

for name, arguments in examples("swiglu", Sizes(K=72, dtype=torch.bfloat16)).items():
    lumina_kernels.swiglu(**arguments)
"""

from importlib import import_module

from lumina_kernels.examples._sizes import Sizes as Sizes


def examples(op: str, sizes: Sizes) -> dict[str, dict]:
    """What is special about a call -> its arguments; the first is the call that a model makes."""
    return import_module(f"lumina_kernels.examples.{op}").examples(sizes)
