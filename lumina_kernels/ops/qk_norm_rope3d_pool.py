"""Normalised, rotated queries beside keys that are that and averaged over windows, and values."""

import torch
from torch import Tensor

from lumina_kernels.backend import launchers, resolve
from lumina_kernels.ops.context_drop import check_context_drop, context_drop_ref, windows_of
from lumina_kernels.ops.qk_norm_rope3d import NORMS, check_qk_norm, qk_norm_rope3d_ref
from lumina_kernels.ops.rope3d import check_rope3d

BACKENDS = ("triton", "cuda", "cpu")


def qk_norm_rope3d_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    axis: Tensor,
    grid: tuple[int, int, int],
    factor: int,
    key_mask: Tensor | None = None,
    eps: float = 1e-5,
    norm: str = "layer_across_heads",
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`qk_norm_rope3d` of q and k, then `context_drop` of k and v; the whole k is never in memory.

    Queries stay whole: context drop of Lumina-Next (arXiv 2406.18583).

    Args:
        q: queries, (B, L, H, K), K even, tokens in row-major (t, h, w).
        k, v: keys and values, (B, L, G, K), same dtype.
        q_weight, q_bias, k_weight, k_bias: parameters of the norm, as for `qk_norm_rope3d`.
        positions: columns (t, h, w), (L, 3) or (B, L, 3), integer or float, in tokens.
        inv_freq: radians per position, (K/2,) or (B, K/2).
        axis: column of `positions` that pair j reads, (K/2,), int32 or int64 in {0, 1, 2}.
        grid: (T, H, W) in tokens, T * H * W = L; the same grid for the whole batch.
        factor: side of a window in tokens, at least 1.
        key_mask: True for keys that count, (B, L) bool.
        eps: added to the mean square.
        norm: "layer_across_heads", "rms_per_head" or "rms_across_heads".
        backend: None takes the best one there is; see `lumina_kernels.backend`.

    Returns:
        q, normalised and rotated, (B, L, H, K); pooled k, that and averaged over the valid tokens
        of each window, and pooled v, (B, L', G, K); their mask, (B, L') bool; and counts of valid
        tokens, (B, L') float32. L' = T * ceil(H / factor) * ceil(W / factor). The arithmetic is
        float32 (float64 for float64), rounded once.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `qk_norm_rope3d` and
            `context_drop`.
    """
    parameters, table = (q_weight, q_bias, k_weight, k_bias), (positions, inv_freq, axis)
    check_rope3d(q, k, *table)
    check_qk_norm(q, k, *parameters, norm)
    check_context_drop(k, v, grid, factor, key_mask)
    constants = {"positions": positions, "inv_freq": inv_freq}
    backend = resolve(backend, BACKENDS, q, k, v, *parameters, **constants)
    rest = key_mask, eps, norm
    if backend == "torch":
        return qk_norm_rope3d_pool_ref(q, k, v, *parameters, *table, grid, factor, *rest)
    return qk_norm_rope3d_pool_fwd(q, k, v, *parameters, *table, list(grid), factor, *rest, backend)


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


# Registered at import, so that torch.compile knows shapes and gradients before any kernel exists.


@torch.library.custom_op("lumina_kernels::qk_norm_rope3d_pool_fwd", mutates_args=())
def qk_norm_rope3d_pool_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    axis: Tensor,
    grid: list[int],
    factor: int,
    key_mask: Tensor | None,
    eps: float,
    norm: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q; pooled k and v, their mask and counts."""
    kernels = launchers("qk_norm_rope3d_pool", backend)
    inputs = q, k, v, q_weight, q_bias, k_weight, k_bias, positions, inv_freq, axis
    return kernels.qk_norm_rope3d_pool_fwd(*inputs, grid, factor, key_mask, eps, norm)


@qk_norm_rope3d_pool_fwd.register_fake
def _(q, k, v, a, b, c, d, positions, inv_freq, axis, grid, factor, *rest):
    B, _, G, K = k.shape
    windows = windows_of(grid, factor)
    k_out, v_out = k.new_empty(B, windows, G, K), v.new_empty(B, windows, G, K)
    mask = k.new_empty(B, windows, dtype=torch.bool)
    counts = k.new_empty(B, windows, dtype=torch.float32)
    return q.new_empty(q.shape), k_out, v_out, mask, counts


@torch.library.custom_op("lumina_kernels::qk_norm_rope3d_pool_bwd", mutates_args=())
def qk_norm_rope3d_pool_bwd(
    dq_out: Tensor,
    dk_out: Tensor,
    dv_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    axis: Tensor,
    counts: Tensor,
    grid: list[int],
    factor: int,
    key_mask: Tensor | None,
    eps: float,
    norm: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradients of the parameters, an empty tensor for None."""
    kernels = launchers("qk_norm_rope3d_pool", backend)
    douts, parameters = (dq_out, dk_out, dv_out), (q_weight, q_bias, k_weight, k_bias)
    inputs = q, k, *parameters, positions, inv_freq, axis, counts
    return kernels.qk_norm_rope3d_pool_bwd(*douts, *inputs, grid, factor, key_mask, eps, norm)


@qk_norm_rope3d_pool_bwd.register_fake
def _(dq_out, dk_out, dv_out, q, k, q_weight, q_bias, k_weight, k_bias, *rest):
    none = q.new_empty(0, dtype=torch.float32)
    parameters = q_weight, q_bias, k_weight, k_bias
    grads = (none.clone() if x is None else x.new_empty(x.shape) for x in parameters)
    return q.new_empty(q.shape), k.new_empty(k.shape), dv_out.new_empty(k.shape), *grads


def _setup_context(ctx, inputs, output):
    q, k, _, *tensors, ctx.grid, ctx.factor, key_mask, ctx.eps, ctx.norm, ctx.backend = inputs
    *_, mask, counts = output
    ctx.mark_non_differentiable(mask, counts)
    ctx.save_for_backward(q, k, *tensors, counts, key_mask)


def _backward(ctx, dq_out, dk_out, dv_out, *_):
    *tensors, key_mask = ctx.saved_tensors
    rest = ctx.grid, ctx.factor, key_mask, ctx.eps, ctx.norm, ctx.backend
    dq, dk, dv, *grads = qk_norm_rope3d_pool_bwd(dq_out, dk_out, dv_out, *tensors, *rest)
    parameters = zip(tensors[2:6], grads, strict=True)
    present = (None if parameter is None else grad for parameter, grad in parameters)
    return dq, dk, dv, *present, *(None,) * 9


qk_norm_rope3d_pool_fwd.register_autograd(_backward, setup_context=_setup_context)
