"""Compile the Triton kernels for GPUs this machine does not have, and read the machine code.

    python -m lumina_kernels.aot --arch 90 --op gqa_attention --head-dim 72 --json report.json

Every launcher runs at the shapes of a model, with the specialisations and configurations it would
have on that GPU, but on a driver that compiles kernels and launches none. The figures are counted
in what the disassembler that comes with Triton prints; nothing is timed.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

from lumina_kernels import backend
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS
from lumina_kernels.output import check_output, replace

# Shared memory that a block may use, in KiB, by compute capability (CUDA C++ Programming Guide).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ARCHS = (80, 90, 100, 120)  # the others have the machine code of 80
HEAD_DIMS = (24, 40, 48, 64, 72, 80, 88, 96, 112, 120, 128, 160, 192, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The names of tensor-core instructions tell m, n and k, and so their FLOPs. HMMA is issued by one
# warp, Hopper's HGMMA by four; Blackwell's UTCHMMA has its shape in a descriptor instead.
_HMMA = re.compile(r"\bHMMA\.(16)(8)(8|16)\.")
_HGMMA = re.compile(r"\bHGMMA\.(64)x(\d+)x(\d+)\.")
_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.E((?:\.\w+)*)")


class OfflineDriver:
    """A Triton driver for a GPU that this machine lacks: kernels are compiled but not loaded or
    launched.

    The device number is the architecture, because Triton caches compiled kernels by device.
    """

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        properties = {"max_shared_mem": SHARED_KIB[arch] << 10, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )
        self.launcher_cls = lambda source, metadata: lambda *args: None

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def offline(arch: int):
    """Kernels launched in this context are compiled for `arch` and not run. Yields a list of those
    not compiled before, each as the files of its stages by name: "x.ttir", "x.cubin", "x.json", ...

    Raises:
        RuntimeError: Triton's interpreter is on, and it compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing")
    from triton import knobs
    from triton.runtime import driver

    compiled = []

    def keep(module, function, name, files, hash):
        compiled.append(files)

    before, device = driver._active, backend.DEVICES["triton"]
    driver.set_active(OfflineDriver(arch))
    backend.DEVICES["triton"] = "cpu"  # where the tensors are here
    knobs.runtime.kernel_load_end_hook.add(keep)
    try:
        yield compiled
    finally:
        knobs.runtime.kernel_load_end_hook.remove(keep)
        driver._active, backend.DEVICES["triton"] = before, device


def inspect(op: str, arch: int, head_dim: int, dtype: str) -> list[dict]:
    """Compile the kernels of one op at one shape and return a row of figures for each.

    registers, stack (bytes per thread; spilled values and arrays), shared (bytes per block), warps;
    loads and stores: share of the bytes of global memory in accesses of 16 bytes or more;
    mma: tensor-core instructions by kind; useful: share of their FLOPs that is not padding.
    """
    kernels = import_module(f"lumina_kernels.triton.{op}")
    useful = 1.0
    if hasattr(kernels, "head_cuts"):
        useful = head_dim / sum(width for _, width in kernels.head_cuts(head_dim))
    rows = []
    sizes = Sizes(
        grid=(1, 16, 16), T=64, H=32, G=8, K=head_dim, F=96 * head_dim, dtype=DTYPES[dtype]
    )
    for name, arguments in examples(op, sizes).items():
        for step, launch in _steps(op, arguments).items():
            call = f"{name} {step}".strip()
            with offline(arch) as compiled:
                try:
                    launch()
                except NotImplementedError as error:  # refused by the launcher
                    rows.append(_row(op, arch, head_dim, dtype, call, error=str(error)))
            for files in compiled:
                paths = {Path(file).suffix: Path(path) for file, path in files.items()}
                rows.append(_row(op, arch, head_dim, dtype, call, **_read(paths, useful)))
    return rows


def _steps(op: str, arguments: dict) -> dict[str, Callable[[], None]]:
    """Launches of the forward, of the forward that keeps what a gradient needs, and of the
    gradient, in this order."""
    module = import_module(f"lumina_kernels.ops.{op}")
    wrt = getattr(module, f"{op}_fwd").differentiable
    floats = {n: x for n, x in arguments.items() if isinstance(x, Tensor) and n in wrt}
    leaves = {n: x.detach().requires_grad_() for n, x in floats.items()}
    outputs = []

    def forward(arguments):
        outs = getattr(module, op)(**arguments, backend="triton")
        return outs if isinstance(outs, tuple) else (outs,)

    def training():
        outputs.extend(x for x in forward(arguments | leaves) if x is not None and x.requires_grad)

    def backward():
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs])

    steps = {"fwd": lambda: forward(arguments)}
    return steps | {"fwd training": training, "bwd": backward} if wrt else steps


def _row(op, arch, head_dim, dtype, call, **figures) -> dict:
    return {"op": op, "arch": arch, "head_dim": head_dim, "dtype": dtype, "call": call} | figures


def _read(files: dict[str, Path], useful: float) -> dict:
    """The figures of one kernel. `useful`: share of its tiles' products that is not padding."""
    metadata = json.loads(files[".json"].read_text())
    usage = tool("cuobjdump", "--dump-resource-usage", files[".cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code = tool("nvdisasm", "-c", files[".cubin"])
    mma, issued = _tensor_cores(code, metadata["num_warps"])
    dots = _DOT.findall(files[".ttir"].read_text())
    wanted = sum(2 * int(m) * int(k) * int(n) for m, k, n in dots)
    return {
        "kernel": metadata["name"],
        "warps": metadata["num_warps"],
        "registers": registers,
        "stack": stack,
        "shared": metadata["shared"],
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "loads": _wide_share(code, ("LDG", "LDGSTS")),
        "stores": _wide_share(code, ("STG",)),
        "mma": mma,
        # Blackwell's instructions do not carry their size; what the kernel asks for is all we know.
        "useful": useful * min(1, wanted / issued) if mma and issued else useful if mma else None,
    }


def _tensor_cores(code: str, warps: int) -> tuple[dict[str, int], int]:
    """Instructions by kind, and the FLOPs of all of them in a block of `warps` warps."""
    kinds, flops = Counter(), 0
    for kind, pattern, groups in (("HMMA", _HMMA, warps), ("HGMMA", _HGMMA, warps // 4)):
        for m, n, k in pattern.findall(code):
            kinds[f"{kind} {m}x{n}x{k}"] += 1
            flops += 2 * int(m) * int(n) * int(k) * groups
    blackwell = len(re.findall(r"\bUTC[A-Z]*MMA\b", code))
    return dict(kinds) | ({"UTCMMA": blackwell} if blackwell else {}), flops


def _wide_share(code: str, kinds: tuple[str, ...]) -> float | None:
    """Share of the bytes that a lane moves 16 or more at a time; None if no bytes move."""
    accesses = Counter()
    for kind, suffix in _ACCESS.findall(code):
        if kind in kinds:
            parts = suffix.split(".")
            accesses[next((w for name, w in _WIDTHS.items() if name in parts), 4)] += 1
    total = sum(width * n for width, n in accesses.items())
    return sum(w * n for w, n in accesses.items() if w >= 16) / total if total else None


def tool(name: str, *args) -> str:
    """The output of one of NVIDIA's tools that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Print a table and, with --json, write it to a file; 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m lumina_kernels.aot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, default=ARCHS)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(argv)
    if options.json is not None:
        try:
            check_output(options.json)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    tasks = [
        (op, arch, head_dim, dtype)
        for arch in options.arch
        for op in options.op
        for head_dim in options.head_dim
        for dtype in options.dtype
    ]
    rows = []
    print(_HEADER)
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(tasks))) as pool:
        for found in tqdm(pool.imap(_inspect, tasks), total=len(tasks), disable=None):
            rows += found
            for row in found:
                tqdm.write(_line(row), file=sys.stdout)
    if options.json is not None:
        try:
            replace(options.json, lambda file: file.write_text(json.dumps(rows, indent=1)))
        except OSError as error:
            sys.exit(f"{options.json}: {error.strerror}")
    failed = [row for row in rows if "error" in row]
    spilled = [row for row in rows if row.get("stack")]
    print(
        f"{len(rows)} kernels, {len(spilled)} of them with a stack, {len(failed)} did not compile"
    )
    return 1 if failed else 0


def _inspect(task):
    op, arch, head_dim, dtype = task
    try:
        return inspect(op, arch, head_dim, dtype)
    except Exception as error:  # a compiler's crash is a row of the report
        return [_row(op, arch, head_dim, dtype, "", error=f"{type(error).__name__}: {error}")]


_HEADER = (
    f"{'op':21}{'sm':>4}{'K':>4} {'dtype':6}{'call':23}{'kernel':31}{'warps':>5}{'regs':>5}"
    f"{'stack':>6}{'shared':>8}{'instr':>7}{'ld16':>6}{'st16':>6}{'useful':>7}  mma"
)


def _line(row: dict) -> str:
    head = f"{row['op']:21}{row['arch']:>4}{row['head_dim']:>4} {row['dtype']:6}{row['call']:23}"
    if "error" in row:
        return f"{head}FAILED {row['error'].splitlines()[0]}"
    loads, stores, useful = (
        "-" if row[name] is None else f"{row[name]:.2f}" for name in ("loads", "stores", "useful")
    )
    mma = ", ".join(f"{count} {kind}" for kind, count in row["mma"].items())
    return (
        f"{head}{row['kernel']:31}{row['warps']:>5}{row['registers']:>5}{row['stack']:>6}"
        f"{row['shared']:>8}{row['instructions']:>7}{loads:>6}{stores:>6}{useful:>7}  {mma}"
    )


if __name__ == "__main__":
    sys.exit(main())
