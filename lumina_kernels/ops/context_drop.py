"""Context drop: fewer keys and values by averaging over windows of the token grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lumina_kernels.backend import launchers, resolve
from lumina_kernels.ops._checks import check_axes, check_float, check_mask, check_same_dtype

BACKENDS = ("triton", "cuda", "cpu")


def context_drop(
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int, int],
    factor: int,
    key_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Average k and v over factor x factor windows of (H, W), the time axis left as it is.

    Windows start at the corner (0, 0), those at the far edges may be smaller, and only valid tokens
    count in a mean. A window without a valid token gives 0 and mask False. Queries stay whole, so
    attention over the result needs nothing undone: context drop of Lumina-Next (arXiv 2406.18583),
    4 times fewer keys at factor 2. `bias=counts.log()[:, None, None]` in `gqa_attention` weighs a
    window by the tokens it stands for.

    Args:
        k, v: keys (after their rotation) and values, (B, L, G, K), tokens in row-major (t, h, w).
        grid: (T, H, W) in tokens, T * H * W = L; the same grid for the whole batch.
        factor: side of a window in tokens, at least 1.
        key_mask: True for keys that count, (B, L) bool.
        backend: None takes the best one there is; see `lumina_kernels.backend`.

    Returns:
        pooled k and v, (B, L', G, K) in k.dtype, L' = T * ceil(H / factor) * ceil(W / factor),
            summed in float32 (float64 for float64) and rounded once;
        their mask, (B, L') bool;
        counts of valid tokens per window, (B, L') float32.

    Raises:
        ValueError: a shape or device does not fit k, the grid does not have L tokens, factor is
            less than 1, or there is no such backend.
        TypeError: k and v are not floating-point tensors of one dtype, or key_mask is not bool.
    """
    check_context_drop(k, v, grid, factor, key_mask)
    backend = resolve(backend, BACKENDS, k, v)
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
    check_float("v", v, k.device, tuple(k.shape))
    check_same_dtype(k=k, v=v)
    B, L = k.shape[:2]
    if len(grid) != 3 or min(grid) < 0 or grid[0] * grid[1] * grid[2] != L:
        raise ValueError(f"grid must be (T, H, W) with T * H * W = {L}, got {tuple(grid)}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if key_mask is not None:
        check_mask("key_mask", key_mask, k.device, (B, L))


# Registered at import, so that torch.compile knows shapes and gradients before any kernel exists.


@torch.library.custom_op("lumina_kernels::context_drop_fwd", mutates_args=())
def context_drop_fwd(
    k: Tensor, v: Tensor, grid: list[int], factor: int, key_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled k and v, their mask and counts."""
    kernels = launchers("context_drop", backend)
    return kernels.context_drop_fwd(k, v, grid, factor, key_mask)


@context_drop_fwd.register_fake
def _(k, v, grid, factor, key_mask, backend):
    B, _, G, K = k.shape
    windows = windows_of(grid, factor)
    k_out, v_out = k.new_empty(B, windows, G, K), v.new_empty(B, windows, G, K)
    mask = k.new_empty(B, windows, dtype=torch.bool)
    return k_out, v_out, mask, k.new_empty(B, windows, dtype=torch.float32)


def windows_of(grid, factor: int) -> int:
    """Windows of one sample."""
    T, H, W = grid
    return T * -(-H // factor) * -(-W // factor)


@torch.library.custom_op("lumina_kernels::context_drop_bwd", mutates_args=())
def context_drop_bwd(
    dk_out: Tensor,
    dv_out: Tensor,
    counts: Tensor,
    grid: list[int],
    factor: int,
    key_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dk and dv: the gradient of a mean, shared out among its tokens."""
    kernels = launchers("context_drop", backend)
    return kernels.context_drop_bwd(dk_out, dv_out, counts, grid, factor, key_mask)


@context_drop_bwd.register_fake
def _(dk_out, dv_out, counts, grid, factor, key_mask, backend):
    B, _, G, K = dk_out.shape
    L = grid[0] * grid[1] * grid[2]
    return dk_out.new_empty(B, L, G, K), dv_out.new_empty(B, L, G, K)


def _setup_context(ctx, inputs, output):
    _, _, ctx.grid, ctx.factor, key_mask, ctx.backend = inputs
    counts = output[3]
    ctx.mark_non_differentiable(output[2], counts)
    ctx.save_for_backward(counts, key_mask)


def _backward(ctx, dk_out, dv_out, *_):
    counts, key_mask = ctx.saved_tensors
    dk, dv = context_drop_bwd(dk_out, dv_out, counts, ctx.grid, ctx.factor, key_mask, ctx.backend)
    return dk, dv, None, None, None, None


context_drop_fwd.register_autograd(_backward, setup_context=_setup_context)
