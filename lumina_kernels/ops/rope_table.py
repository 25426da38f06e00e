"""Rotary position embedding from cos and sin tables, for models that bring their own."""

import torch
from torch import Tensor

from lumina_kernels.axes import Heads, Table
from lumina_kernels.backend import BEST_FIRST, resolve
from lumina_kernels.checks import check_floating, check_shape
from lumina_kernels.kernel_op import kernel_op, like
from lumina_kernels.ops.rope3d import check_rope_heads

PAIRINGS = ("interleaved", "half")


def rope_table(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, pairing: str = "interleaved",
    channels: int | None = None, *, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return x * cos + rot(x) * sin for x = q and x = k.

    rot maps a pair (a, b) to (-b, a). Pairs are the channels (2j, 2j + 1) for "interleaved" (Flux,
    Wan, Lumina) and (j, j + channels/2) for "half" (Cosmos, Llama). RoPE: arXiv 2104.09864, Eq. 34.

    A table has one entry for each of its pairs, or one for each channel, as some models give the
    two channels of a pair different entries. It is read where it lies, whatever its strides:
    `freqs.real` and `freqs.imag` of complex numbers, entries of 2 x 2 matrices, `expand`ed axes.

    Args:
        q: queries, (B, L, H, K), K even.
        k: keys, (B, L, G, K), same dtype; None where only queries are rotated.
        cos, sin: tables, (L, W), (B, L, W) or (B, L, H, W), with one W, channels or channels / 2.
            B and H of a table may be 1; a table for each head needs G = H.
        pairing: "interleaved" or "half".
        channels: how many channels of a head are rotated, the first ones, an even number. The
            others stay as they are. None rotates all.
        backend: None takes the best one available; see `lumina_kernels.backend`.

    Returns:
        q and k rotated (None for None), shapes and dtype kept. The arithmetic is float32 (float64
        for float64), rounded once.

    Raises:
        ValueError, TypeError: a shape, device, dtype, pairing or number of channels is not as
            above.
        NotImplementedError: cos or sin requires a gradient and `backend` names a kernel, which
            differentiates q and k alone; None takes the definition then.
    """
    check_rope_heads(q, q if k is None else k)
    channels = check_rope_table(q, k, cos, sin, pairing, channels)
    backend = resolve(backend, BEST_FIRST, q, k, cos=cos, sin=sin, op="rope_table")
    if backend == "torch":
        return rope_table_ref(q, k, cos, sin, pairing, channels)
    q_out, k_out = rope_table_fwd(q, k, cos, sin, pairing, channels, backend)
    return q_out, None if k is None else k_out


def rope_table_ref(q, k, cos, sin, pairing="interleaved", channels=None):
    """The definition."""
    acc = torch.promote_types(q.dtype, torch.float32)
    C = q.shape[-1] if channels is None else channels
    pairs, dim = ((-1, 2), -1) if pairing == "interleaved" else ((2, -1), -2)
    cos, sin = (z.to(acc) if z.ndim == 4 else z.to(acc).unsqueeze(-2) for z in (cos, sin))
    if cos.shape[-1] < C:
        cos, sin = (torch.stack((z, z), dim).flatten(-2) for z in (cos, sin))

    def rotate(x):  # the tables are ([B or 1,] L, H or 1, C)
        y = x if C == x.shape[-1] else x[..., :C]
        a, b = y.to(acc).unflatten(-1, pairs).unbind(dim)
        y = (y.to(acc) * cos + torch.stack((-b, a), dim).flatten(-2) * sin).to(x.dtype)
        return y if C == x.shape[-1] else torch.cat((y, x[..., C:]), -1)

    return rotate(q), None if k is None else rotate(k)


def check_rope_table(q, k, cos, sin, pairing, channels) -> int:
    """The tables of a rotation of q, (B, L, H, K), and k, (B, L, G, K) or None. Returns how many
    channels they rotate."""
    B, L, H, K = q.shape
    if channels is None:
        channels = K
    elif channels % 2 or not 0 < channels <= K:
        raise ValueError(f"channels must be even and within 2..{K}, got {channels}")
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, got {pairing!r}")
    usual = (L, channels), (B, L, channels)
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        if table.shape not in usual or table.device != q.device:
            _check_table(name, table, q, H if k is None else k.shape[2], channels)
    if sin.shape[-1] != cos.shape[-1]:
        raise ValueError(
            f"sin must have as many entries as cos, {cos.shape[-1]}, got {sin.shape[-1]}"
        )
    return channels


def _check_table(name, table, q, G, channels) -> None:
    """`table` is on q's device, of any shape that the public function names."""
    B, L, H, _ = q.shape
    axes, heads = tuple(table.shape[:-1]), H if G == H else 1
    check_shape(name, table, q.device, table.shape)  # the device
    if (
        axes[:2] in ((L,), (B, L), (1, L))
        and (len(axes) < 3 or axes[2:] in ((1,), (heads,)))
        and table.shape[-1] in (channels, channels // 2)
    ):
        return
    if G != H and axes in ((B, L, H), (1, L, H)):
        raise ValueError(f"{name} for each head needs as many of k as of q, got {G} and {H}")
    raise ValueError(
        f"{name} must have shape ({L}, W), ({B}, {L}, W) or ({B}, {L}, {heads}, W) with W "
        f"{channels} or {channels // 2}, where batch and heads may be 1, got {tuple(table.shape)}"
    )


@kernel_op("q_out k_out", over="B L H")
def rope_table_fwd(
    q: Heads, k: Heads | None, cos: Table, sin: Table, pairing: str, channels: int
) -> tuple[Heads, Heads | None]:
    return like(q, k)


@rope_table_fwd.backward("dq dk")
def rope_table_bwd(dq_out, dk_out, cos, sin, pairing, channels):
    return like(dq_out, dk_out)
