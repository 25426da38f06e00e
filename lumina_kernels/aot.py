"""Compile the Triton kernels for GPUs this machine does not have, and read the machine code.

    python -m lumina_kernels.aot --arch 90 --op gqa_attention --head-dim 72 --json report.json

Every launcher runs at the shapes of a model, with the specialisations and configurations it would
have on that GPU, but on a driver that compiles kernels and launches none. The figures are counted
in what the disassembler that comes with Triton prints (`sass`); nothing is timed. What time a
kernel should take is computed from them (`prediction`).
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

from lumina_kernels import backend, sass
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.machine import MACHINES
from lumina_kernels.ops import OPS
from lumina_kernels.output import check_output, replace
from lumina_kernels.prediction import Launch, predicted

# Shared memory that a block may use, in KiB, by compute capability (CUDA C++ Programming Guide).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ARCHS = (80, 90, 100, 120)  # the others have the machine code of 80
HEAD_DIMS = (24, 40, 48, 64, 72, 80, 88, 96, 112, 120, 128, 160, 192, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")


class OfflineDriver:
    """A Triton driver for a GPU that this machine lacks: kernels are compiled but not loaded or
    launched.

    The device number is the architecture, because Triton caches compiled kernels by device.
    `launches` has what was launched: the machine code, the number of blocks and the arguments.
    """

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        processors = next((z.processors for z in MACHINES.values() if z.arch == arch), 128)
        properties = {"max_shared_mem": SHARED_KIB[arch] << 10, "multiprocessor_count": processors}
        self.launches: list[tuple[bytes, int, tuple]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, kernel, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )
        self.launcher_cls = lambda source, metadata: self._launch

    def _launch(self, x, y, z, stream, kernel, metadata, *arguments):
        self.launches.append((kernel, x * y * z, arguments))

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
    not compiled before, each as the files of its stages by name: "x.ttir", "x.cubin", ...;
    and the launches, as in `OfflineDriver`.

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
    offline_driver = OfflineDriver(arch)
    driver.set_active(offline_driver)
    backend.DEVICES["triton"] = "cpu"  # where the tensors are here
    knobs.runtime.kernel_load_end_hook.add(keep)
    try:
        yield compiled, offline_driver.launches
    finally:
        knobs.runtime.kernel_load_end_hook.remove(keep)
        driver._active, backend.DEVICES["triton"] = before, device


def inspect(
    op: str, arch: int, head_dim: int, dtype: str, side: int = 16, first: bool = False
) -> list[dict]:
    """Compile the kernels of one op, for pictures of side x side tokens, and return a row of
    figures for each. `first`: of its examples only the first, which is what a model calls it with.

    registers, stack (bytes per thread; spilled values and arrays), shared (bytes per block), warps;
    loads and stores: share of the bytes of global memory in accesses of 16 bytes or more;
    mma: tensor-core instructions by kind; useful: share of their FLOPs that is not padding;
    what `prediction.Prediction` has, but the times; these are in predicted: GPU -> microseconds,
    share of the rate of a copy or of the tensor cores, and what limits it.
    """
    useful, rows = useful_share(op, head_dim), []
    sizes = Sizes(
        grid=(1, side, side), T=64, H=32, G=8, K=head_dim, F=96 * head_dim, dtype=DTYPES[dtype]
    )
    for name, arguments in list(examples(op, sizes).items())[: 1 if first else None]:
        for step, launch in _steps(op, arguments).items():
            call = f"{name} {step}".strip()
            with offline(arch) as (compiled, launches):
                try:
                    launch()
                except NotImplementedError as error:  # refused by the launcher
                    rows.append(_row(op, arch, head_dim, dtype, call, error=str(error)))
            for found in figures(compiled, launches, arch, useful):
                rows.append(_row(op, arch, head_dim, dtype, call, **found))
    return rows


def useful_share(op: str, head_dim: int) -> float:
    """Of the products of an op, what the padding of the head dimension leaves."""
    if op != "gqa_attention":
        return 1.0
    cuts = import_module("lumina_kernels.triton.gqa_attention_tiles").head_cuts(head_dim)
    return head_dim / sum(width for _, width in cuts)


def figures(compiled: list, launches: list, arch: int, useful: float = 1.0) -> list[dict]:
    """The figures of the kernels that `offline` has compiled, as launched first. `useful`: as
    `useful_share`."""
    rows = []
    for files in compiled:
        paths = {Path(file).suffix: Path(path) for file, path in files.items()}
        code = paths[".cubin"].read_bytes()
        grid, arguments = next(launch[1:] for launch in launches if launch[0] == code)
        rows.append(_read(paths, useful, arch, grid, arguments))
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


def _read(files: dict[str, Path], useful: float, arch: int, grid: int, arguments: tuple) -> dict:
    """The figures of one kernel. `useful`: share of its tiles' products that is not padding."""
    metadata = json.loads(files[".json"].read_text())
    usage = tool("cuobjdump", "--dump-resource-usage", files[".cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    (function,) = sass.functions(tool("nvdisasm", "-c", "-hex", files[".cubin"])).values()
    mma, issued = _tensor_cores(function.code, metadata["num_warps"])
    dots = _DOT.findall(files[".ttir"].read_text())
    wanted = sum(2 * int(m) * int(k) * int(n) for m, k, n in dots)
    size, flops = _needed(metadata["name"], arguments)
    launch = Launch(
        function, grid, metadata["num_warps"], registers, metadata["shared"], size, flops / useful
    )
    return {
        "kernel": metadata["name"],
        "warps": metadata["num_warps"],
        "registers": registers,
        "stack": stack,
        "shared": metadata["shared"],
        "instructions": len(function.code),
        "loads": _wide_share(function.code, ("LDG", "LDGSTS")),
        "stores": _wide_share(function.code, ("STG",)),
        "mma": mma,
        # Blackwell's instructions do not carry their size; what the kernel asks for is all we know.
        "useful": useful * min(1, wanted / issued) if mma and issued else useful if mma else None,
        **predicted(launch, arch, useful),
    }


def _needed(name: str, arguments: tuple) -> tuple[int, int]:
    """Bytes of the tensors that a launch is given, each of them read or written once, and FLOPs of
    attention's products, as if no key were masked."""
    tensors = {}

    def collect(value):
        if isinstance(value, Tensor):
            tensors[value.data_ptr()] = value
        elif isinstance(value, (tuple, list)):
            for z in value:
                collect(z)

    collect(arguments)
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    products = {"fwd": 2, "dq": 3, "dkv": 4}.get(name.removeprefix("gqa_attention_")[:-7], 0)
    if not products or not name.startswith("gqa_attention_"):
        return size, 0
    heads = [x for x in tensors.values() if x.ndim == 4]
    q, k = heads[:2] if products == 2 else heads[1:3]  # dout comes before them
    return size, 2 * products * q.numel() * k.shape[1]


def _tensor_cores(code: list[sass.Instruction], warps: int) -> tuple[dict[str, int], int]:
    """Instructions by kind, and the FLOPs of all of them in a block of `warps` warps."""
    kinds = Counter()
    for x in code:
        if x.flops:
            kinds[f"{x.kind} {'x'.join(map(str, x.tile))}"] += 1
        elif re.fullmatch(r"UTC[A-Z]*MMA", x.kind):
            kinds["UTCMMA"] += 1
    return dict(kinds), warps * sum(x.flops for x in code)


def _wide_share(code: list[sass.Instruction], kinds: tuple[str, ...]) -> float | None:
    """Share of the bytes that a lane moves 16 or more at a time; None if no bytes move."""
    widths = [x.width for x in code if x.kind in kinds]
    total = sum(widths)
    return sum(w for w in widths if w >= 16) / total if total else None


def tool(name: str, *args, cwd: str | None = None) -> str:
    """The output of one of NVIDIA's tools that come with Triton, run in the folder `cwd`."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True, cwd=cwd).stdout


def main(argv: list[str] | None = None) -> int:
    """Print a table and, with --json, write it to a file; 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m lumina_kernels.aot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, default=ARCHS)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--side", type=int, default=16, help="tokens along an edge of the picture")
    parser.add_argument("--first", action="store_true", help="only what a model calls an op with")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(argv)
    if options.json is not None:
        try:
            check_output(options.json)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    tasks = [
        (op, arch, head_dim, dtype, options.side, options.first)
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
    op, arch, head_dim, dtype, *_ = task
    try:
        return inspect(*task)
    except Exception as error:  # a compiler's crash is a row of the report
        return [_row(op, arch, head_dim, dtype, "", error=f"{type(error).__name__}: {error}")]


_HEADER = (
    f"{'op':21}{'sm':>4}{'K':>4} {'dtype':6}{'call':23}{'kernel':31}{'warps':>5}{'regs':>5}"
    f"{'stack':>6}{'shared':>8}{'instr':>7}{'ld16':>6}{'st16':>6}{'useful':>7}"
    f"{'us':>9}{'share':>6} {'limit':14} mma"
)


def _line(row: dict) -> str:
    head = f"{row['op']:21}{row['arch']:>4}{row['head_dim']:>4} {row['dtype']:6}{row['call']:23}"
    if "error" in row:
        return f"{head}FAILED {row['error'].splitlines()[0]}"
    loads, stores, useful = (
        "-" if row[name] is None else f"{row[name]:.2f}" for name in ("loads", "stores", "useful")
    )
    mma = ", ".join(f"{count} {kind}" for kind, count in row["mma"].items())
    time = f"{'-':>9}{'-':>6} {'-':14}"
    for found in list(row["predicted"].values())[:1]:
        time = f"{found['us']:9.1f}{found['share']:6.2f} {found['limit']:14}"
    return (
        f"{head}{row['kernel']:31}{row['warps']:>5}{row['registers']:>5}{row['stack']:>6}"
        f"{row['shared']:>8}{row['instructions']:>7}{loads:>6}{stores:>6}{useful:>7}"
        f"{time} {mma}"
    )


if __name__ == "__main__":
    sys.exit(main())
