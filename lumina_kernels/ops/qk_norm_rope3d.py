"""Normalisation of queries and keys, and their rotation, without rounding in between."""

import torch
from torch import Tensor

from lumina_kernels.axes import Frequencies, Heads, Positions, Vector
from lumina_kernels.backend import BEST_FIRST, resolve, wants_grad
from lumina_kernels.checks import check_optional
from lumina_kernels.kernel_op import kernel_op, like
from lumina_kernels.ops.norm_modulate import norm_modulate_ref
from lumina_kernels.ops.rope3d import check_rope3d, rope3d_ref

MOST_CUDA_VALUES = 8192  # of a token, kBwdLimits in csrc/cuda/lib/qk_norm_bwd.cuh
NORMS = ("layer_across_heads", "rms_per_head", "rms_across_heads")
_NAMES = {name: (f"{name}_weight", f"{name}_bias") for name in "qk"}


def qk_norm_rope3d(
    q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
    k_bias: Tensor | None, positions: Tensor, inv_freq: Tensor, axis: Tensor, eps: float = 1e-5,
    norm: str = "layer_across_heads", *, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return rope3d(norm(q) * q_weight + q_bias, norm(k) * k_weight + k_bias).

    "layer_across_heads" is a LayerNorm over all heads of a token (Lumina-Next, arXiv 2406.18583),
    "rms_per_head" an RMSNorm over each head (Lumina-Image 2.0, Flux), "rms_across_heads" an
    RMSNorm over all heads (Wan). The rotation is that of `rope3d`.

    Args:
        q: queries, (B, L, H, K), K even.
        k: keys, (B, L, G, K), same dtype.
        q_weight: (K,) for "rms_per_head", (H * K,) for the others; None leaves the factor out.
        q_bias: shaped as q_weight for "layer_across_heads"; None leaves it out, and the RMS norms
            have none.
        k_weight, k_bias: the same for k, (K,) or (G * K,).
        positions: columns (t, h, w), (L, 3) or (B, L, 3), integer or float, in tokens.
        inv_freq: radians per position, (K/2,) or (B, K/2).
        axis: column of `positions` that pair j reads, (K/2,), int32 or int64 in {0, 1, 2}.
        eps: added to the mean square.
        norm: "layer_across_heads", "rms_per_head" or "rms_across_heads".
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        q and k, normalised and rotated, shapes and dtype kept. The arithmetic is float32 (float64
        for float64), rounded once.

    Raises:
        ValueError, TypeError: a shape, device, dtype or norm is not as above, or a bias comes with
            an RMS norm.
        NotImplementedError, RuntimeError: as `rope3d`, or backend is "cuda" and a gradient is
            required of tokens that its backward cannot hold, more than 8192 values of q or of k.
    """
    check_rope3d(q, k, positions, inv_freq, axis)
    parameters = q_weight, q_bias, k_weight, k_bias
    check_qk_norm(q, k, *parameters, norm)
    constants = {"positions": positions, "inv_freq": inv_freq}
    floats = q, k, *parameters
    backend = resolve(
        backend, BEST_FIRST, *floats, refused=refusals(*floats), **constants, op="qk_norm_rope3d"
    )
    if backend == "torch":
        return qk_norm_rope3d_ref(q, k, *parameters, positions, inv_freq, axis, eps, norm)
    return qk_norm_rope3d_fwd(q, k, *parameters, positions, inv_freq, axis, eps, norm, backend)


def qk_norm_rope3d_ref(
    q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, eps=1e-5, norm=NORMS[0]
):
    """The definition."""
    rows = qk_norm_ref(q, k, q_weight, q_bias, k_weight, k_bias, eps, norm)
    q_out, k_out = rope3d_ref(*rows, positions, inv_freq, axis)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def qk_norm_ref(q, k, q_weight, q_bias, k_weight, k_bias, eps, norm):
    """Queries and keys, or None, normalised, not rounded to their dtype."""
    acc = torch.promote_types(q.dtype, torch.float32)
    kind = "layer" if norm == "layer_across_heads" else "rms"

    def normalise(x, weight, bias):
        row = x if norm == "rms_per_head" else x.flatten(-2)  # (B, L, heads * K)
        return norm_modulate_ref(row.to(acc), weight, bias, eps=eps, kind=kind).view(x.shape)

    return normalise(q, q_weight, q_bias), None if k is None else normalise(k, k_weight, k_bias)


def refusals(q, k, *others: Tensor | None) -> dict[str, str]:
    """What CUDA's backward cannot hold of a token, as `backend.resolve` takes it."""
    _, _, heads, K = q.shape
    if k is not None:
        heads = max(heads, k.shape[2])
    held = -(-heads // 2) * 2 * -(-K // 8) * 8
    if held <= MOST_CUDA_VALUES or not wants_grad(q, k, *others):
        return {}
    most = f"computes gradients of at most {MOST_CUDA_VALUES} values of a token"
    return {"cuda": f"{most}, got {held} (heads in pairs, head_dim in eights)"}


def check_qk_norm(q, k, q_weight, q_bias, k_weight, k_bias, norm) -> None:
    """The parameters of a norm of q, (B, L, H, K), and k, (B, L, G, K) or None."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    device = q.device
    for name, x, weight, bias in (("q", q, q_weight, q_bias), ("k", k, k_weight, k_bias)):
        if x is None:
            if weight is not None or bias is not None:
                raise ValueError(f"{name}_weight and {name}_bias must be None without {name}")
            continue
        if weight is None and bias is None:
            continue
        _, _, heads, K = x.shape
        width = K if norm == "rms_per_head" else heads * K
        check_optional(_NAMES[name][0], weight, device, (width,))
        if bias is not None and norm != "layer_across_heads":
            raise ValueError(f"{name}_bias must be None for {norm!r}, which has no bias")
        check_optional(_NAMES[name][1], bias, device, (width,))


@kernel_op("q_out k_out", over="B L")
def qk_norm_rope3d_fwd(
    q: Heads, k: Heads, q_weight: Vector | None, q_bias: Vector | None, k_weight: Vector | None,
    k_bias: Vector | None, positions: Positions, inv_freq: Frequencies, axis: Tensor, eps: float,
    norm: str,
) -> tuple[Heads, Heads]:  # fmt: skip
    return like(q, k)


@qk_norm_rope3d_fwd.backward("dq dk dq_weight dq_bias dk_weight dk_bias")
def qk_norm_rope3d_bwd(
    dq_out, dk_out, q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, eps, norm
):
    return like(q, k, q_weight, q_bias, k_weight, k_bias)
