"""Accuracy of every op on a GPU at a model's sizes: python -m benchmarks.gpu.accuracy ROWS

Every example of every op with 4096 tokens of 32 heads of 72 in bfloat16, forward and backward, by
the rule of tests/common.py: at most twice the error of eager PyTorch, both against float64; and the
same call several times in a row, which must give the same bits. ROWS gets a line for each backend
and example: for every result its error as a share of what is allowed.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

import lumina_kernels
from benchmarks.harness.hopper import is_there, on_hopper
from benchmarks.harness.rows import append
from lumina_kernels.backend import MISSING
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "ops")]

from attention import eager as eager_attention  # noqa: E402
from common import cast, run  # noqa: E402

REPEATS = 5  # of a call
HOPPER = "cuda hopper"  # attention's forward by wgmma, which has to be asked for
MODEL = dict(B=1, grid=(1, 64, 64), T=128, H=32, G=8, K=72, F=6144, dtype=torch.bfloat16)
SMALL = dict(grid=(1, 3, 4), T=5, H=4, G=2, K=24, F=40, dtype=torch.float16)
FLOAT32_ROUNDINGS = 8 * torch.finfo(torch.float32).eps


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.accuracy")
    parser.add_argument("rows", type=Path, help="file to append to")
    parser.add_argument("--budget", type=float, default=300, help="seconds (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes, to try this program out")
    args = parser.parse_args()
    sizes = Sizes(**(SMALL if args.small else MODEL), device="cuda")
    end, failed, late = time.monotonic() + args.budget, 0, 0
    backends = [name for name in ("triton", "cuda") if name not in MISSING]
    hopper = [HOPPER] if "cuda" in backends and is_there() else []
    # Attention first: it is what may be wrong, and what takes long.
    for op in sorted(OPS, key=lambda op: op != "gqa_attention"):
        torch.manual_seed(0)
        for name, inputs in examples(op, sizes).items():
            if time.monotonic() > end:
                late += 1
                continue
            for row in rows_of(op, name, inputs, backends + hopper * (op == "gqa_attention")):
                append(args.rows, row)
                failed += not row["ok"]
                print(line(row), flush=True)
    print(f"{failed} failed, {late} examples were left out for want of time")
    return int(failed > 0)


def rows_of(op: str, name: str, inputs: dict, backends: list[str]):
    """A row for each backend that computes this example."""
    common = {"op": op, "example": name}
    try:
        low, high = expected(op, inputs)
    except Exception as error:
        yield common | {"backend": "torch", "ok": False, "error": brief(error)}
        return
    for backend in backends:
        row = common | {"backend": backend}
        try:
            row |= compared(op, inputs, backend, low, high)
        except Exception as error:
            row |= {"ok": False, "error": brief(error)}
        yield row
        torch.cuda.empty_cache()


def expected(op: str, inputs: dict) -> tuple[dict, dict]:
    """Results of eager PyTorch in the dtype of the inputs, and in float64."""
    definition = partial(getattr(lumina_kernels, op), backend="torch")
    eager = eager_attention if op == "gqa_attention" else definition
    high = run(definition, cast(inputs, torch.float64), wrt=differentiable(op))
    return run(eager, inputs, wrt=differentiable(op)), high


def compared(op: str, inputs: dict, backend: str, low: dict, high: dict) -> dict:
    """Shares of the allowed errors, and whether repeated calls give the same bits."""
    call = partial(getattr(lumina_kernels, op), backend=backend.split()[0])
    with on_hopper() if backend == HOPPER else nullcontext():
        runs = [run(call, inputs, wrt=differentiable(op)) for _ in range(REPEATS)]
    shares = {key: share(value, low[key], high[key]) for key, value in runs[0].items()}
    same = all(torch.equal(other[key], runs[0][key]) for other in runs for key in runs[0])
    worst = max(shares.values())
    return {"ok": same and worst <= 1, "same bits": same, "worst": worst, "shares": shares}


def differentiable(op: str) -> frozenset[str]:
    module = sys.modules[f"lumina_kernels.ops.{op}"]
    return getattr(module, f"{op}_fwd").differentiable


def share(out, low, high) -> float:
    """The error of `out` over the allowed one, of maximum and RMS the larger share; inf for NaN."""
    out, low, high = out.double(), low.double(), high.double()
    shares = [0.0]
    for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
        if high.numel():
            allowed = 2 * norm(low - high) + FLOAT32_ROUNDINGS * norm(high)
            error = norm(out - high)
            shares.append((error / allowed).nan_to_num(torch.inf).item() if error != 0 else 0.0)
    return max(shares)


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def line(row: dict) -> str:
    said = row.get("error") or f"{row['worst']:.2f} of the allowed error"
    said += "" if row.get("same bits", True) else ", other bits in a later call"
    verdict = "ok" if row["ok"] else "FAILED"
    return f"{verdict:7}{row['op']:21}{row['example']:16}{row['backend']:12}{said}"


if __name__ == "__main__":
    sys.exit(main())
