"""Registers, stack and shared memory of the CUDA kernels as built: python -m benchmarks.cuda_code

Read from the machine code in lumina_kernels._C_cuda with cuobjdump, which triton ships; no GPU is
needed. Shared memory is the static part. A stack of 32 bytes belongs to the slow path of sincosf
for huge angles; for spilled registers nvcc warns when the library is built (-warn-spills).

The kernels of Lumina-Next at 1024 pixels (2 x 4096 tokens, bfloat16) come with the time that
`lumina_kernels.prediction` has for them, the share of the rate of a copy or of the tensor cores,
and what limits them. So do the kernels over rows at several widths; their share is that of a copy
that is launched, too.
"""

import argparse
import re
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.cuda_launches import launches
from benchmarks.harness.shapes import LUMINA_NEXT, Shape
from lumina_kernels import sass
from lumina_kernels.aot import tool
from lumina_kernels.machine import MACHINES
from lumina_kernels.prediction import Launch, predict, predicted, resident_blocks

_FUNCTION = re.compile(r"_ZN14lumina_kernels4cuda\d+(\w+?_kernel)(I\w+?EE)?")


def predictions(path: str, arch: str = "90", shape: Shape = LUMINA_NEXT) -> list[dict]:
    """What `prediction.predicted` says of the kernels of `cuda_launches` that the library has for
    an architecture, beside `kernels`' figures; those for Hopper alone are among those of 90."""
    built = [row for row in kernels(path) if row["arch"] in (arch, f"{arch}a")]
    usage = {(row["kernel"], row["arguments"]): row for row in built}
    archs = sorted({row["arch"] for row in built})
    codes = {name: code for z in archs for name, code in functions(path, z).items()}
    found = []
    for x in launches(shape):
        if x.names not in codes:
            continue
        row = usage[x.names]
        launch = Launch(
            codes[x.names], x.grid, x.threads // 32, row["registers"], row["shared"] + x.shared,
            x.bytes, x.flops / x.useful,
        )  # fmt: skip
        figures = predicted(launch, int(arch), x.useful)
        found.append(row | {"note": x.note, "arch": arch} | figures)
    return found


WIDTHS = (1152, 2304, 3072, 3840)
# Kernel over plain rows (csrc/cuda/lib/rows.cuh) -> tensors of rows that it moves, rows at once in
# a forward, sums over rows in a backward.
_FORWARDS = {
    "norm_modulate": (2, 4), "sandwich_norm": (3, 2), "sandwich_norm_chain": (4, 2),
    "gate_residual_norm": (4, 2),
}  # fmt: skip
_BACKWARDS = {
    "norm_modulate": (3, 2), "sandwich_norm": (3, 1), "sandwich_norm_chain": (6, 2),
    "gate_residual_norm": (6, 3),
}  # fmt: skip


def row_predictions(path: str, arch: str, shape: Shape = LUMINA_NEXT) -> list[dict]:
    """What the model says of the kernels over plain rows at `WIDTHS`, of 16 bits, on each GPU of an
    architecture: `us`, and the `share` of a copy of the tensors. A backward kernel is followed by
    the second stage of its sums, which is not in its figures."""
    usage = {(r["kernel"], r["arguments"]): r for r in kernels(path) if r["arch"] == arch}
    found = []
    for name, function in sorted(functions(path, arch).items(), key=lambda item: item[0]):
        op, way = re.fullmatch(r"(\w+?)(?:_(fwd|bwd))?_kernel", name[0]).groups()
        known = {"fwd": _FORWARDS, "bwd": _BACKWARDS}.get(way, {})
        if op not in known or name[1] not in ("0", "0, 1"):
            continue
        tensors, count = known[op]
        for machine in (z for z in MACHINES.values() if z.arch == int(arch)):
            for D in WIDTHS:
                size, warps = 2 * tensors * shape.B * shape.L * D, -(-D // 256)
                registers, shared = usage[name]["registers"], usage[name]["shared"]
                launch = Launch(
                    function, shape.B * shape.L // count, warps, registers, shared, size
                )
                if way == "bwd":
                    grid = _chunks(shape, resident_blocks(launch, machine) * machine.processors)
                    launch = replace(launch, grid=grid, bytes=size + 4 * count * grid * D)
                figures = predict(launch, machine)
                copy = machine.launch + size / machine.copy_rate
                found.append(
                    {"gpu": machine.name, "kernel": name[0], "D": D, "us": figures.seconds * 1e6,
                     "share": copy / figures.seconds, "limit": figures.limit,
                     "resident": figures.resident, "in_flight": figures.in_flight,
                     "per_copy": figures.per_copy, **usage[name]}
                )  # fmt: skip
    return found


def _chunks(shape: Shape, at_once: int) -> int:
    """Blocks of a backward kernel over rows: `row_chunks` (csrc/cuda/lib/rows_launch.h), for few
    samples."""
    rows = -(-shape.L // max(1, at_once // shape.B))
    return shape.B * -(-shape.L // max(4, rows + rows % 2))


def functions(path: str, arch: str) -> dict[tuple[str, str], sass.Function]:
    """The kernels of a library or an object, by name and template arguments."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", f"sm_{arch}.cubin", Path(path).absolute(), cwd=folder)
        for cubin in Path(folder).iterdir():
            for name, function in sass.functions(tool("nvdisasm", "-c", "-hex", cubin)).items():
                if match := _FUNCTION.match(name):
                    found[_name(match)] = function
    return found


def _name(function: re.Match) -> tuple[str, str]:
    """A kernel's name and its template arguments."""
    return function[1], ", ".join(re.findall(r"[a-zE](\d+)E", function[2] or ""))


def library() -> str:
    """The path of the CUDA library.

    Raises:
        FileNotFoundError: it was not built.
    """
    found = find_spec("lumina_kernels._C_cuda")
    if found is None:
        raise FileNotFoundError("lumina_kernels._C_cuda is not built, it needs nvcc")
    return found.origin


def kernels(path: str | None = None) -> list[dict]:
    """One row for each kernel and architecture: arch, kernel, template arguments, registers of a
    thread, bytes of stack, bytes of shared memory."""
    usage = tool("cuobjdump", "--dump-resource-usage", path or library())
    rows, arch = [], None
    for line in usage.splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif found := _FUNCTION.match(line.removeprefix(" Function ")):
            name = _name(found)
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, found.groups())
            figures = {"registers": registers, "stack": stack, "shared": shared}
            rows.append({"arch": arch, "kernel": name[0], "arguments": name[1]} | figures)
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    built = sorted(kernels(), key=lambda row: (row["kernel"], row["arguments"], row["arch"]))
    for row in built:
        print("{kernel:38}{arguments:10} sm_{arch:5}{registers:4}{stack:5}{shared:6}".format(**row))
    for arch in sorted({row["arch"] for row in built} & {str(z.arch) for z in MACHINES.values()}):
        for row in predictions(library(), arch):
            for gpu, found in row["predicted"].items():
                print(
                    "{kernel:32}{arguments:12}{note:6}{registers:4} registers{resident:3} blocks"
                    "{in_flight:8} B in flight ".format(**row)
                    + f"{gpu:13}"
                    + "{us:8.1f} us{share:6.2f} {limit}".format(**found)
                )
        for row in row_predictions(library(), arch):
            print(
                "{kernel:32}{gpu:13}{D:5}{registers:4} registers{resident:3} blocks".format(**row)
                + "{us:8.1f} us{share:6.2f} {limit}".format(**row)
            )


if __name__ == "__main__":
    main()
