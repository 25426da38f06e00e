"""Normalisation of queries and keys, and their rotation by tables, without rounding in between."""

from torch import Tensor

from lumina_kernels.axes import Heads, Table, Vector
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.kernel_op import kernel_op, like
from lumina_kernels.ops.qk_norm_rope3d import NORMS, check_qk_norm, qk_norm_ref, refusals
from lumina_kernels.ops.rope3d import check_rope_heads
from lumina_kernels.ops.rope_table import check_rope_table, rope_table_ref


def qk_norm_rope_table(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, q_bias: Tensor | None,
    k_weight: Tensor | None, k_bias: Tensor | None, cos: Tensor, sin: Tensor,
    pairing: str = "interleaved", channels: int | None = None, eps: float = 1e-5,
    norm: str = "layer_across_heads", *, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return rope_table(norm(q) * q_weight + q_bias, norm(k) * k_weight + k_bias).

    The norms are those of `qk_norm_rope3d`, the rotation is that of `rope_table`.

    Args:
        q: queries, (B, L, H, K), K even.
        k: keys, (B, L, G, K), same dtype; None where there are only queries.
        q_weight: (K,) for "rms_per_head", (H * K,) for the others; None leaves the factor out.
        q_bias: shaped as q_weight for "layer_across_heads"; None leaves it out, and the RMS norms
            have none.
        k_weight, k_bias: the same for k, (K,) or (G * K,); None without k.
        cos, sin: tables of any strides, (L, W), (B, L, W) or (B, L, H, W), with one W, channels or
            channels / 2. B and H of a table may be 1; a table for each head needs G = H.
        pairing: "interleaved" or "half".
        channels: how many channels of a head are rotated, the first ones, an even number. The
            others are normalised only. None rotates all.
        eps: added to the mean square.
        norm: "layer_across_heads", "rms_per_head" or "rms_across_heads".
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        q and k, normalised and rotated (None for None), shapes and dtype kept. The arithmetic is
        float32 (float64 for float64), rounded once.

    Raises:
        ValueError, TypeError: a shape, device, dtype, pairing, norm or number of channels is not as
            above, a bias comes with an RMS norm, or a parameter of k without k.
        NotImplementedError, RuntimeError: as `rope_table`, or backend is "cuda" and a gradient is
            required of tokens that its backward cannot hold, more than 8192 values of q or of k.
    """
    check_rope_heads(q, q if k is None else k)
    channels = check_rope_table(q, k, cos, sin, pairing, channels)
    parameters = q_weight, q_bias, k_weight, k_bias
    check_qk_norm(q, k, *parameters, norm)
    floats = q, k, *parameters
    table = cos, sin, pairing, channels, eps, norm
    backend = resolve(
        backend,
        BEST_FIRST,
        *floats,
        refused=refusals(*floats),
        cos=cos,
        sin=sin,
        op="qk_norm_rope_table",
    )
    if backend == "torch":
        return qk_norm_rope_table_ref(*floats, *table)
    q_out, k_out = qk_norm_rope_table_fwd(*floats, *table, backend)
    return q_out, None if k is None else k_out


def qk_norm_rope_table_ref(
    q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, pairing="interleaved", channels=None,
    eps=1e-5, norm=NORMS[0],
):  # fmt: skip
    """The definition."""
    rows = qk_norm_ref(q, k, q_weight, q_bias, k_weight, k_bias, eps, norm)
    q_out, k_out = rope_table_ref(*rows, cos, sin, pairing, channels)
    return q_out.to(q.dtype), None if k is None else k_out.to(k.dtype)


@kernel_op("q_out k_out", over="B L")
def qk_norm_rope_table_fwd(
    q: Heads, k: Heads | None, q_weight: Vector | None, q_bias: Vector | None,
    k_weight: Vector | None, k_bias: Vector | None, cos: Table, sin: Table, pairing: str,
    channels: int, eps: float, norm: str,
) -> tuple[Heads, Heads | None]:  # fmt: skip
    return like(q, k)


@qk_norm_rope_table_fwd.backward("dq dk dq_weight dq_bias dk_weight dk_bias")
def qk_norm_rope_table_bwd(
    dq_out, dk_out, q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, pairing, channels, eps, norm
):
    return like(q, k, q_weight, q_bias, k_weight, k_bias)
