"""Registers, stack and shared memory of the CUDA kernels as built: python -m benchmarks.cuda_code

Read from the machine code in lumina_kernels._C_cuda with cuobjdump, which triton ships; no GPU is
needed. Shared memory is the static part. A stack of 32 bytes belongs to the slow path of sincosf
for huge angles; for spilled registers nvcc warns when the library is built (-warn-spills).
"""

import argparse
import re
from importlib.util import find_spec

from lumina_kernels.aot import tool


def kernels() -> list[dict]:
    """One row for each kernel and architecture: arch, kernel, template arguments, registers of a
    thread, bytes of stack, bytes of shared memory."""
    library = find_spec("lumina_kernels._C_cuda")
    if library is None:
        raise FileNotFoundError("lumina_kernels._C_cuda is not built, it needs nvcc")
    usage = tool("cuobjdump", "--dump-resource-usage", library.origin)
    function = re.compile(r" Function _ZN14lumina_kernels4cuda\d+(\w+?_kernel)(I\w+?EE)?")
    rows, arch = [], None
    for line in usage.splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif found := function.match(line):
            name = found[1], ", ".join(re.findall(r"[a-zE](\d+)E", found[2] or ""))
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, found.groups())
            figures = {"registers": registers, "stack": stack, "shared": shared}
            rows.append({"arch": arch, "kernel": name[0], "arguments": name[1]} | figures)
    return rows


def useful_fraction(head_dim: int) -> float:
    """Fraction of the multiply-adds of attention's tensor-core instructions that is not padding.

    The head dimension is padded to a multiple of 16 in products with keys, and to a multiple of 8
    in products with values.
    """
    steps = -(-head_dim // 16) * 16, -(-head_dim // 8) * 8
    return 2 * head_dim / sum(steps)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for row in sorted(kernels(), key=lambda row: (row["kernel"], row["arguments"], row["arch"])):
        print("{kernel:38}{arguments:10} sm_{arch:5}{registers:4}{stack:5}{shared:6}".format(**row))
    print("attention, useful:", {K: round(useful_fraction(K), 3) for K in (64, 72, 96, 128)})


if __name__ == "__main__":
    main()
