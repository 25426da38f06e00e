"""Rotary position embedding from cos and sin tables, for models that bring their own."""

from typing import Annotated

import torch
from torch import Tensor

from lumina_kernels.axes import Heads
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import check_float
from lumina_kernels.kernel_op import kernel_op, like
from lumina_kernels.ops.rope3d import check_rope_heads

PAIRINGS = ("interleaved", "half")
Table = Annotated[Tensor, "[B] L K"]


def rope_table(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, pairing: str = "interleaved", *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return x * cos + rot(x) * sin for x = q and x = k.

    rot maps a pair (a, b) to (-b, a). Pairs are the channels (2j, 2j + 1) for "interleaved" (Flux,
    Wan, Lumina) and (j, j + K/2) for "half" (Cosmos, Llama). The tables are full width because
    some models give the two channels of a pair different entries. RoPE: arXiv 2104.09864, Eq. 34.

    Args:
        q: queries, (B, L, H, K), K even.
        k: keys, (B, L, G, K), same dtype; None where only queries are rotated.
        cos, sin: tables, (L, K) or (B, L, K), shared by the heads.
        pairing: "interleaved" or "half".
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        q and k rotated (None for None), shapes and dtype kept. The arithmetic is float32 (float64
        for float64), rounded once.

    Raises:
        ValueError, TypeError: a shape, device, dtype or pairing is not as above.
        NotImplementedError: cos or sin requires a gradient and `backend` names a kernel, which
            differentiates q and k alone; None takes the definition then.
    """
    check_rope_heads(q, q if k is None else k)
    B, L, _, K = q.shape
    check_float("cos", cos, q.device, (L, K), (B, L, K))
    check_float("sin", sin, q.device, (L, K), (B, L, K))
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, got {pairing!r}")
    backend = resolve(backend, BEST_FIRST, q, k, cos=cos, sin=sin)
    if backend == "torch":
        return rope_table_ref(q, k, cos, sin, pairing)
    q_out, k_out = rope_table_fwd(q, k, cos, sin, pairing, backend)
    return q_out, None if k is None else k_out


def rope_table_ref(q, k, cos, sin, pairing="interleaved"):
    """The definition."""
    acc = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(acc).unsqueeze(-2), sin.to(acc).unsqueeze(-2)  # ([B,] L, 1, K)
    pairs, dim = ((-1, 2), -1) if pairing == "interleaved" else ((2, -1), -2)

    def rotate(x):
        a, b = x.to(acc).unflatten(-1, pairs).unbind(dim)
        return (x.to(acc) * cos + torch.stack((-b, a), dim).flatten(-2) * sin).to(x.dtype)

    return rotate(q), None if k is None else rotate(k)


@kernel_op("q_out k_out", over="B L H")
def rope_table_fwd(
    q: Heads, k: Heads | None, cos: Table, sin: Table, pairing: str
) -> tuple[Heads, Heads | None]:
    return like(q, k)


@rope_table_fwd.backward("dq dk")
def rope_table_bwd(dq_out, dk_out, cos, sin, pairing):
    return like(dq_out, dk_out)
