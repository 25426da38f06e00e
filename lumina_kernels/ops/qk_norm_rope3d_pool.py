"""`qk_norm_rope3d` and `context_drop` in one pass."""

from typing import Annotated

import torch
from torch import Tensor

from lumina_kernels.axes import Frequencies, Heads, PooledHeads, Positions, Vector, Windows
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.kernel_op import kernel_op, like
from lumina_kernels.ops.context_drop import check_context_drop, context_drop_ref, pooled
from lumina_kernels.ops.qk_norm_rope3d import NORMS, check_qk_norm, qk_norm_rope3d_ref, refusals
from lumina_kernels.ops.rope3d import check_rope3d


def qk_norm_rope3d_pool(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, q_bias: Tensor | None,
    k_weight: Tensor | None, k_bias: Tensor | None, positions: Tensor, inv_freq: Tensor,
    axis: Tensor, grid: tuple[int, int, int], factor: int, key_mask: Tensor | None = None,
    eps: float = 1e-5, norm: str = "layer_across_heads", *, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`qk_norm_rope3d` of q and k, then `context_drop` of k and v; the whole k is never in memory.

    Queries stay whole: context drop of Lumina-Next (arXiv 2406.18583).

    Args:
        q: queries, (B, L, H, K), K even, tokens in row-major (t, h, w).
        k, v: keys and values, (B, L, G, K), same dtype.
        q_weight, q_bias, k_weight, k_bias: parameters of the norm, as for `qk_norm_rope3d`.
        positions, inv_freq, axis: the rotation, as for `rope3d`.
        grid: (T, H, W) in tokens, T * H * W = L; the same grid for the whole batch.
        factor: side of a window in tokens, at least 1.
        key_mask: True for keys that count, (B, L) bool.
        eps, norm: as for `qk_norm_rope3d`.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        q, normalised and rotated, (B, L, H, K); pooled k, that and averaged over the valid tokens
        of each window, and pooled v, (B, L', G, K); their mask, (B, L') bool; and counts of valid
        tokens, (B, L') float32. L' = T * ceil(H / factor) * ceil(W / factor). The arithmetic is
        float32 (float64 for float64), rounded once.

    Raises:
        the errors of `qk_norm_rope3d` and of `context_drop`.
    """
    parameters, table = (q_weight, q_bias, k_weight, k_bias), (positions, inv_freq, axis)
    check_rope3d(q, k, *table)
    check_qk_norm(q, k, *parameters, norm)
    check_context_drop(k, v, grid, factor, key_mask)
    constants = {"positions": positions, "inv_freq": inv_freq}
    floats = q, k, v, *parameters
    backend = resolve(
        backend,
        BEST_FIRST,
        *floats,
        refused=refusals(*floats),
        **constants,
        op="qk_norm_rope3d_pool",
    )
    inputs = q, k, v, *parameters, *table, list(grid), factor, key_mask, eps, norm
    if backend == "torch":
        return qk_norm_rope3d_pool_ref(*inputs)
    return qk_norm_rope3d_pool_fwd(*inputs, backend)


def qk_norm_rope3d_pool_ref(
    q, k, v, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis, grid, factor,
    key_mask=None, eps=1e-5, norm=NORMS[0],
):  # fmt: skip
    """The definition."""
    acc = torch.promote_types(q.dtype, torch.float32)
    parameters, table = (q_weight, q_bias, k_weight, k_bias), (positions, inv_freq, axis)
    q_out, k_out = qk_norm_rope3d_ref(q.to(acc), k.to(acc), *parameters, *table, eps, norm)
    k_out, v_out, mask, counts = context_drop_ref(k_out, v.to(acc), grid, factor, key_mask)
    return q_out.to(q.dtype), k_out.to(k.dtype), v_out.to(v.dtype), mask, counts


@kernel_op("q_out k_out v_out mask counts", over="B")
def qk_norm_rope3d_pool_fwd(
    q: Heads, k: Heads, v: Heads, q_weight: Vector | None, q_bias: Vector | None,
    k_weight: Vector | None, k_bias: Vector | None, positions: Positions, inv_freq: Frequencies,
    axis: Tensor, grid: list[int], factor: int, key_mask: Annotated[Tensor, "B L"] | None,
    eps: float, norm: str,
) -> tuple[Heads, PooledHeads, PooledHeads, Windows, Windows]:  # fmt: skip
    return *like(q), *pooled(k, v, grid, factor)


@qk_norm_rope3d_pool_fwd.backward("dq dk dv dq_weight dq_bias dk_weight dk_bias")
def qk_norm_rope3d_pool_bwd(
    dq_out, dk_out, dv_out, q, k, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis,
    counts, grid, factor, key_mask, eps, norm,
):  # fmt: skip
    dv = dv_out.new_empty(k.shape)
    return *like(q, k), dv, *like(q_weight, q_bias, k_weight, k_bias)
