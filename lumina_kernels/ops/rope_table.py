"""Rotary position embedding from cos and sin tables, for models that bring their own."""

import torch
from torch import Tensor

from lumina_kernels.backend import launchers, resolve
from lumina_kernels.ops._checks import check_float
from lumina_kernels.ops.rope3d import check_heads

BACKENDS = ("triton", "cuda", "cpu")
PAIRINGS = ("interleaved", "half")


def rope_table(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pairing: str = "interleaved",
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return x * cos + rot(x) * sin for x = q and x = k.

    rot maps a pair (a, b) to (-b, a). Pairs are the channels (2j, 2j + 1) for "interleaved" (Flux,
    Wan, Lumina) and (j, j + K/2) for "half" (Cosmos, Llama). The tables are full width because
    some models give the two channels of a pair different entries. RoPE: arXiv 2104.09864, Eq. 34.

    Args:
        q: queries, (B, L, H, K), K even.
        k: keys, (B, L, G, K), same dtype; None where only queries turn.
        cos, sin: tables, (L, K) or (B, L, K), shared by the heads.
        pairing: "interleaved" or "half".
        backend: None takes the best one there is; see `lumina_kernels.backend`.

    Returns:
        q and k rotated (None for None), shapes and dtype kept. The arithmetic is float32 (float64
        for float64), rounded once.

    Raises:
        ValueError: a shape or device does not fit q, or pairing or backend is not one there is.
        TypeError: an argument is not a floating-point tensor, or q and k differ in dtype.
        NotImplementedError: cos or sin asks for a gradient and `backend` names a kernel: they
            differentiate q and k alone. None takes the definition then.
    """
    check_heads(q, q if k is None else k)
    B, L, _, K = q.shape
    check_float("cos", cos, q.device, (L, K), (B, L, K))
    check_float("sin", sin, q.device, (L, K), (B, L, K))
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, got {pairing!r}")
    backend = resolve(backend, BACKENDS, q, k, cos=cos, sin=sin)
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


# Registered at import, so that torch.compile knows shapes and gradients before any kernel exists.
# An op returns no None: where k is None, its output and gradient are empty tensors.


@torch.library.custom_op("lumina_kernels::rope_table_fwd", mutates_args=())
def rope_table_fwd(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, pairing: str, backend: str
) -> tuple[Tensor, Tensor]:
    """q and k rotated."""
    kernels = launchers("rope_table", backend)
    q_out, k_out = kernels.rope_table_fwd(q, k, cos, sin, pairing)
    return q_out, q.new_empty(0) if k is None else k_out


@torch.library.custom_op("lumina_kernels::rope_table_bwd", mutates_args=())
def rope_table_bwd(
    dq_out: Tensor, dk_out: Tensor | None, cos: Tensor, sin: Tensor, pairing: str, backend: str
) -> tuple[Tensor, Tensor]:
    """dq and dk from the gradients of the outputs."""
    kernels = launchers("rope_table", backend)
    dq, dk = kernels.rope_table_bwd(dq_out, dk_out, cos, sin, pairing)
    return dq, dq_out.new_empty(0) if dk_out is None else dk


@rope_table_fwd.register_fake
@rope_table_bwd.register_fake
def _(q, k, cos, sin, pairing, backend):
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


def _setup_context(ctx, inputs, output):
    _, k, cos, sin, ctx.pairing, ctx.backend = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq_out, dk_out):
    dk_out = dk_out if ctx.has_k else None
    dq, dk = rope_table_bwd(dq_out, dk_out, *ctx.saved_tensors, ctx.pairing, ctx.backend)
    return dq, dk if ctx.has_k else None, None, None, None, None


rope_table_fwd.register_autograd(_backward, setup_context=_setup_context)
