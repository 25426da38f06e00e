"""Attention's CUDA kernels on one problem, on the host, with another text of one of their headers
if one is given. head_dim 72, bfloat16, two samples, text and masks."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from common import assert_as_accurate, cast, randn, run
from cuda_host.attention import assert_lse, logsumexp
from cuda_host.build import CSRC, build
from ops.attention import eager, logsumexp_of

from lumina_kernels import gqa_attention
from lumina_kernels.triton.gqa_attention import split_scale

# 200 rows of a kv head: blocks of 192 and of 8, or of 128 and of 72. The last tile of keys is cut.
SIZES = {"B": 2, "L": 100, "H": 4, "G": 2, "L_kv": 300, "T": 137, "K": 72}
SCALE = 0.3
GIVEN = ("q", "k", "v", "text_k", "text_v", "dout", "mask", "text_mask", "gate")
RESULTS = ("out", "error", "stats", "text_stats", "dq", "dk", "dv", "dtext_k", "dtext_v", "dgate")
GRADIENTS = ("dq", "dk", "dv", "dtext_k", "dtext_v")


class Problem(ctypes.Structure):
    """As mutants.h has it."""

    _fields_ = [
        *((name, ctypes.c_int) for name in SIZES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*GIVEN, *RESULTS)),
    ]


@cache
def inputs():
    """Holes in tiles of keys, and whole tiles of them."""
    B, L, H, G, L_kv, T, K = SIZES.values()
    torch.manual_seed(0)
    found = {"q": randn(B, L, H, K), "k": randn(B, L_kv, G, K), "v": randn(B, L_kv, G, K)}
    found |= {"key_mask": torch.ones(B, L_kv, dtype=torch.bool), "scale": SCALE}
    found |= {"text_k": randn(B, T, G, K), "text_v": randn(B, T, G, K)}
    found |= {"text_mask": torch.ones(B, T, dtype=torch.bool), "text_gate": randn(H)}
    found["key_mask"][0, 40:60] = found["key_mask"][1, :140] = False
    found["text_mask"][0, 100:] = found["text_mask"][1, ::3] = False
    return cast(found, torch.bfloat16)


@cache
def expected():
    """What eager PyTorch has for results and gradients, and float64."""
    return run(eager, inputs()), run(gqa_attention, cast(inputs(), torch.float64))


def dout():
    """As `common.run` has it."""
    shape = inputs()["q"].shape
    return ((torch.arange(shape.numel()) * 7 % 17 - 8) / 8).view(shape).bfloat16()


def kept():
    """What the forward leaves for the backward."""
    wide, exact = cast(inputs(), torch.float64), expected()[1]["out 0"]
    out = exact.bfloat16()
    error = (exact - out.double()) / (out.double().abs() * 2**-8) * 127
    found = {"out": out, "error": error.nan_to_num().round().clamp(-127, 127).to(torch.int8)}
    for name, scale in (("", SCALE), ("text_", SIZES["K"] ** -0.5)):
        k, mask = wide[f"{name}k"], wide["text_mask" if name else "key_mask"]
        inner, outer = split_scale(scale)
        R = SIZES["H"] // SIZES["G"]
        scores = inner * torch.einsum("blhk,bmhk->bhlm", wide["q"], k.repeat_interleave(R, 2))
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        top = scores.amax(-1)
        total = ((scores - top[..., None]) * outer).exp2().sum(-1).log2()
        both = torch.stack((top, total), -1).unflatten(1, (-1, R)).transpose(2, 3)
        found[f"{name}stats"] = both.float().contiguous()
    return found


def library(kind, *folders):
    """Kernels of a kind, with headers from `folders`, where these have them."""
    source = Path(__file__).with_name(f"mutants_{kind}.cu")
    found = ctypes.CDLL(str(build([source], *folders, CSRC)))
    found.mutant.restype = ctypes.c_char_p
    return found


def compute(library, kind):
    """The results, by name.

    Raises:
        RuntimeError: what the host reports.
    """
    x = inputs()
    given = {name: x[name] for name in GIVEN[:5]} | {"dout": dout()}
    given |= {"mask": x["key_mask"], "text_mask": x["text_mask"], "gate": x["text_gate"].float()}
    B, L, H, G = (SIZES[name] for name in "BLHG")
    stats = torch.full((B, G, L, H // G, 2), torch.nan)
    results = {"out": x["q"], "error": torch.zeros_like(x["q"], dtype=torch.int8)}
    results |= {"stats": stats, "text_stats": stats, "dgate": stats[..., 0]}
    results |= {name: x[name[1:]] for name in GRADIENTS}
    results = {
        name: torch.full_like(results[name], 0 if name == "error" else torch.nan)
        for name in RESULTS
    }
    if kind == "backward":
        results |= kept()
    tensors = {name: x.contiguous() for name, x in (given | results).items()}
    pointers = {name: x.data_ptr() for name, x in tensors.items()}
    if error := library.mutant(ctypes.byref(Problem(**SIZES, scale=SCALE, **pointers))).decode():
        raise RuntimeError(error)
    return {name: tensors[name] for name in RESULTS}


def assert_right(kind, results):
    """The accuracy rule, for what kernels of this kind compute."""
    low, high = expected()
    if kind == "backward":
        for name in GRADIENTS:
            assert_as_accurate(name, results[name], low[name], high[name])
        dgate = results["dgate"].double().sum((0, 2)).flatten()
        assert_as_accurate("dtext_gate", dgate, low["dtext_gate"], high["dtext_gate"])
        return
    assert_as_accurate("out", results["out"], low["out 0"], high["out 0"])
    lost = results["out"].double() - high["out 0"]
    unit = results["out"].double().abs() * torch.finfo(torch.bfloat16).eps / 2 / 127
    left = lost + results["error"].double() * unit
    assert left.square().mean() < 0.5 * lost.square().mean()
    wide, float32 = (cast(inputs(), dtype) for dtype in (torch.float64, torch.float32))
    for name, scale in (("", SCALE), ("text_", SIZES["K"] ** -0.5)):
        names = "q", f"{name}k", "text_mask" if name else "key_mask"
        found = logsumexp_of(results[f"{name}stats"], scale)
        assert_lse(found, *(logsumexp(*(x[n] for n in names), scale) for x in (float32, wide)))
