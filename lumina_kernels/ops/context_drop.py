"""Context drop: fewer keys and values by averaging over windows of the token grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lumina_kernels.axes import Heads, PooledHeads, RowStatistic, Windows
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import are_like, check_axes, check_float, check_mask, check_same_dtype
from lumina_kernels.kernel_op import kernel_op


def context_drop(
    k: Tensor, v: Tensor, grid: tuple[int, int, int], factor: int, key_mask: Tensor | None = None,
    *, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Average k and v over factor x factor windows of (H, W), the time axis left as it is.

    Windows start at the corner (0, 0); those at the far edges may be smaller. Only valid tokens
    count in a mean, and a window without any is 0 with mask False. Queries are not pooled, so the
    output of attention needs no unpooling: context drop of Lumina-Next (arXiv 2406.18583), 4 times
    fewer keys at factor 2. `bias=counts.log()[:, None, None]` in `gqa_attention` weighs a window by
    the number of tokens it stands for.

    Args:
        k, v: keys (after their rotation) and values, (B, L, G, K), tokens in row-major (t, h, w).
        grid: (T, H, W) in tokens, T * H * W = L; the same grid for the whole batch.
        factor: side of a window in tokens, at least 1.
        key_mask: True for keys that count, (B, L) bool.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        pooled k and v, (B, L', G, K) in k.dtype, L' = T * ceil(H / factor) * ceil(W / factor),
            summed in float32 (float64 for float64) and rounded once;
        their mask, (B, L') bool;
        counts of valid tokens per window, (B, L') float32.

    Raises:
        ValueError, TypeError: a shape, device or dtype is not as above, the grid does not have L
            tokens, or factor is less than 1.
    """
    check_context_drop(k, v, grid, factor, key_mask)
    backend = resolve(backend, BEST_FIRST, k, v, op="context_drop")
    if backend == "torch":
        return context_drop_ref(k, v, grid, factor, key_mask)
    return context_drop_fwd(k, v, list(grid), factor, key_mask, backend)


def context_drop_ref(k, v, grid, factor, key_mask=None):
    """The definition."""
    acc = torch.promote_types(k.dtype, torch.float32)
    valid = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    valid = valid[:, :, None, None]  # (B, L, 1, 1)

    T, H, W = grid
    rows, columns = -(-H // factor), -(-W // factor)  # of windows

    def window_sum(x):  # (B, L, G, K) -> (B, L', G, K)
        beyond = (0, 0, 0, 0, 0, columns * factor - W, 0, rows * factor - H)
        x = F.pad(x.unflatten(1, (T, H, W)), beyond)
        x = x.unflatten(3, (columns, factor)).unflatten(2, (rows, factor))
        return x.sum((3, 5)).flatten(1, 3)

    counts = window_sum(valid.float())
    sums = [window_sum(x.to(acc).masked_fill(~valid, 0)) for x in (k, v)]
    k_mean, v_mean = ((total / counts.clamp(min=1)).to(k.dtype) for total in sums)
    return k_mean, v_mean, counts[:, :, 0, 0] > 0, counts[:, :, 0, 0]


def check_context_drop(k, v, grid, factor, key_mask) -> None:
    """The arguments of averages of k and v over windows of the grid."""
    check_axes("k", k, "B, L, G, K")
    if not are_like(k.dtype, k.device, k.shape, v):
        check_float("v", v, k.device, tuple(k.shape))
        check_same_dtype(k=k, v=v)
    B, L = k.shape[:2]
    if len(grid) != 3 or min(grid) < 0 or grid[0] * grid[1] * grid[2] != L:
        raise ValueError(f"grid must be (T, H, W) with T * H * W = {L}, got {tuple(grid)}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    check_mask("key_mask", key_mask, k.device, (B, L))


def pooled(k, v, grid, factor):
    """Results without values: the means of k and v, their mask and counts."""
    (T, H, W), (B, _, G, K) = grid, k.shape
    windows = T * -(-H // factor) * -(-W // factor)
    mask, counts = (k.new_empty(B, windows, dtype=t) for t in (torch.bool, torch.float32))
    return k.new_empty(B, windows, G, K), v.new_empty(B, windows, G, K), mask, counts


@kernel_op("k_out v_out mask counts", over="B")
def context_drop_fwd(
    k: Heads, v: Heads, grid: list[int], factor: int, key_mask: RowStatistic | None
) -> tuple[PooledHeads, PooledHeads, Windows, Windows]:
    return pooled(k, v, grid, factor)


@context_drop_fwd.backward("dk dv")
def context_drop_bwd(dk_out, dv_out, counts, grid, factor, key_mask):
    (B, _, G, K), (T, H, W) = dk_out.shape, grid
    return dk_out.new_empty(B, T * H * W, G, K), dv_out.new_empty(B, T * H * W, G, K)
