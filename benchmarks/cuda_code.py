"""Registers, stack and shared memory of the CUDA kernels as built: python -m benchmarks.cuda_code

Read from the machine code in lumina_kernels._C_cuda with cuobjdump, which triton ships; no GPU is
needed. Shared memory is the static part. A stack of 32 bytes belongs to the slow path of sincosf
for huge angles; for spilled registers nvcc warns when the library is built (-warn-spills).

The forward kernels of Lumina-Next at 1024 pixels (2 x 4096 tokens, bfloat16) come with the time
that `lumina_kernels.prediction` has for them, the share of the rate of a copy or of the tensor
cores, and what limits them. So do the kernels over rows, forward and backward, at several widths;
their share is that of a copy that is launched, too.
"""

import argparse
import re
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness.shapes import LUMINA_NEXT, Shape
from lumina_kernels import sass
from lumina_kernels.aot import tool
from lumina_kernels.machine import MACHINES
from lumina_kernels.prediction import Launch, predict, predicted, resident_blocks

_FUNCTION = re.compile(r"_ZN14lumina_kernels4cuda\d+(\w+?_kernel)(I\w+?EE)?")


def launches(shape: Shape) -> dict[tuple[str, str], tuple[int, int, int, int, int]]:
    """Forward kernel and template arguments -> blocks, threads, bytes of dynamic shared memory,
    bytes that it must move and FLOPs of its products, as the launchers have it for heads of 72
    channels and context drop by 2 x 2."""
    B, L, H, G, K = shape.B, shape.L, shape.H, shape.G, shape.K
    rows = B * L
    numbers, windows = rows * (H + G) * K, rows // 4
    pieces = -(-K // 8) * -(-(H + G) // 2)  # of two heads a thread
    token = 32 * -(-pieces // 32)
    flat = rows * shape.F * 2
    attention = 4 * rows * L * H * K
    return {
        ("swiglu_fwd_kernel", ""): (flat // 4096, 256, 0, 3 * flat, 0),
        ("gelu_fwd_kernel", "1"): (flat // 4096, 256, 0, 2 * flat, 0),
        ("rope3d_kernel", ""): (rows, token, 32 * 9, 4 * numbers, 0),
        ("rope_table_kernel", "1, 0"): (rows, token, 0, 4 * numbers + 8 * L * K, 0),
        ("qk_norm_rope3d_kernel", "2"): (rows, token, 576, 4 * numbers, 0),
        ("qk_norm_rope_table_kernel", "2"): (rows, token, 8192, 4 * numbers + 8 * L * K, 0),
        ("qk_norm_rope3d_pool_kernel", "2"): (
            windows, token, 576, 2 * rows * K * (2 * H + 2 * G) + 4 * windows * G * K, 0,
        ),
        ("context_drop_kernel", ""): (windows, 160, 0, 4 * (rows + windows) * G * K, 0),
        ("gqa_attention_fwd_kernel", "72, 2, 0"): (
            B * G * -(-L * (H // G) // 128), 128, 36864, 4 * numbers, attention,
        ),
    }  # fmt: skip


def predictions(path: str, arch: str = "90") -> list[dict]:
    """What `prediction.predicted` says of these kernels, by `kernel` and `arguments`."""
    wanted, rows = launches(LUMINA_NEXT), []
    usage = {(r["kernel"], r["arguments"]): r for r in kernels(path) if r["arch"] == arch}
    for name, function in _functions(path, arch).items():
        if name not in wanted:
            continue
        grid, threads, dynamic, size, flops = wanted[name]
        registers, shared = usage[name]["registers"], usage[name]["shared"] + dynamic
        useful = useful_fraction(LUMINA_NEXT.K) if flops else 1.0
        launch = Launch(function, grid, threads // 32, registers, shared, size, flops / useful)
        figures = predicted(launch, int(arch), useful)
        rows.append({"arch": arch, "kernel": name[0], "arguments": name[1]} | figures)
    return rows


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
    for name, function in sorted(_functions(path, arch).items(), key=lambda item: item[0]):
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


def _functions(path: str, arch: str) -> dict[tuple[str, str], sass.Function]:
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


def useful_fraction(head_dim: int) -> float:
    """Fraction of the multiply-adds of attention's tensor-core instructions that is not padding.

    The head dimension is padded to a multiple of 16 in products with keys, and to a multiple of 8
    in products with values.
    """
    steps = -(-head_dim // 16) * 16, -(-head_dim // 8) * 8
    return 2 * head_dim / sum(steps)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    built = sorted(kernels(), key=lambda row: (row["kernel"], row["arguments"], row["arch"]))
    for row in built:
        print("{kernel:38}{arguments:10} sm_{arch:5}{registers:4}{stack:5}{shared:6}".format(**row))
    for arch in sorted({row["arch"] for row in built} & {str(z.arch) for z in MACHINES.values()}):
        for row in predictions(library(), arch):
            for gpu, found in row["predicted"].items():
                print(
                    "{kernel:38}{arguments:10} ".format(**row)
                    + f"{gpu:13}"
                    + "{us:8.1f} us{share:6.2f} {limit}".format(**found)
                )
        for row in row_predictions(library(), arch):
            print(
                "{kernel:32}{gpu:13}{D:5}{registers:4} registers{resident:3} blocks".format(**row)
                + "{us:8.1f} us{share:6.2f} {limit}".format(**row)
            )
    print("attention, useful:", {K: round(useful_fraction(K), 3) for K in (64, 72, 96, 128)})


if __name__ == "__main__":
    main()
