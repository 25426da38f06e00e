"""Rotary position embedding over up to three axes, angles computed on the fly."""

import torch
from torch import Tensor

from lumina_kernels.axes import Frequencies, Heads, Positions
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import are_like, check_axes, check_float, check_same_dtype, check_shape
from lumina_kernels.kernel_op import kernel_op, like


def rope3d(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, axis: Tensor,
    *, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate pair j, the channels (2j, 2j + 1), by phi_j = positions[..., axis[j]] * inv_freq[j].

    (a, b) becomes (a cos phi - b sin phi, a sin phi + b cos phi): RoPE (arXiv 2104.09864, Eq. 34)
    in which each pair has its own coordinate. `axis` assigns the pairs to the axes: 1, 2, 1, 2, ...
    for Lumina-Next images, t, h, w alternating for its video, blocks for Lumina-Image 2.0, Flux and
    Wan.

    Args:
        q: queries, (B, L, H, K), K even.
        k: keys, (B, L, G, K), same dtype.
        positions: columns (t, h, w), (L, 3) or (B, L, 3), integer or float, in tokens.
        inv_freq: radians per position, (K/2,), or (B, K/2) where each sample has its own.
        axis: column of `positions` that pair j reads, (K/2,), int32 or int64 in {0, 1, 2}.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        q and k rotated, shapes and dtype kept. Angles and rotation are float32 (float64 for
        float64), rounded once.

    Raises:
        ValueError, TypeError: a shape, device or dtype is not as above.
        NotImplementedError: positions or inv_freq requires a gradient and `backend` names a kernel,
            which differentiates q and k alone; None takes the definition then.
        RuntimeError, or a failure of the device: an entry of axis is not 0, 1 or 2. The kernels
            return NaN for it.
    """
    check_rope3d(q, k, positions, inv_freq, axis)
    backend = resolve(
        backend, BEST_FIRST, q, k, positions=positions, inv_freq=inv_freq, op="rope3d"
    )
    if backend == "torch":
        return rope3d_ref(q, k, positions, inv_freq, axis)
    return rope3d_fwd(q, k, positions, inv_freq, axis, backend)


def rope3d_ref(q, k, positions, inv_freq, axis):
    """The definition."""
    acc = torch.promote_types(q.dtype, torch.float32)
    angle = positions.index_select(-1, axis).to(acc) * inv_freq.to(acc).unsqueeze(-2)
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)  # ([B,] L, 1, K/2)

    def rotate(x):
        a, b = x.to(acc).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)

    return rotate(q), rotate(k)


def check_rope3d(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, axis: Tensor) -> None:
    """The arguments of a rotation of q, (B, L, H, K), and k, (B, L, G, K)."""
    check_rope_heads(q, k)
    (B, L, _, K), device = q.shape, q.device
    check_shape("positions", positions, device, (L, 3), (B, L, 3))
    if positions.dtype is torch.bool or positions.is_complex():
        raise TypeError(f"positions must be integer or floating, got {positions.dtype}")
    check_float("inv_freq", inv_freq, device, (K // 2,), (B, K // 2))
    check_shape("axis", axis, device, (K // 2,))
    if axis.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"axis must be int32 or int64, got {axis.dtype}")


def check_rope_heads(q: Tensor, k: Tensor) -> None:
    """q is (B, L, H, K) and k (B, L, G, K) with the same dtype and an even K."""
    check_axes("q", q, "B, L, H, K")
    check_axes("k", k, "B, L, G, K")
    B, L, _, K = q.shape
    shape = B, L, k.shape[2], K
    if not are_like(q.dtype, q.device, shape, k):
        check_float("k", k, q.device, shape)
        check_same_dtype(q=q, k=k)
    if K % 2:
        raise ValueError(f"q must have an even head_dim to rotate pairs, got {K}")


@kernel_op("q_out k_out", over="B L H")
def rope3d_fwd(
    q: Heads, k: Heads, positions: Positions, inv_freq: Frequencies, axis: Tensor
) -> tuple[Heads, Heads]:
    return like(q, k)


@rope3d_fwd.backward("dq dk")
def rope3d_bwd(dq_out, dk_out, positions, inv_freq, axis):
    return like(dq_out, dk_out)
