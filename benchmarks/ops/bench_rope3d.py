"""rope3d: the rotation of queries and keys by their positions in the picture."""

import torch

import lumina_kernels as lk
from benchmarks.harness.case import Case, Unavailable, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES
from lumina.models.parts.rope import positions, rope_axes, rope_frequencies

SHAPES = (*OP_SHAPES, *BACKWARD_SHAPES)
PEERS = ("liger", "flash-attn")


def case(shape, device) -> Case:
    B, L, H, G, K, randn = shape.B, shape.L, shape.H, shape.G, shape.K, shape.randn(device)
    q, k = randn(B, L, H, K), randn(B, L, G, K)
    place = places(shape, device)
    angle = angles(**place)
    table = complex_table(angle)

    def eager(q, k):
        return rotate(q, table), rotate(k, table)

    numbers, coordinates = 2 * B * L * (H + G) * K, 3 * L
    return Case(
        inputs={"q": q, "k": k},
        ours=ours(lk.rope3d, device, **place),
        eager=eager,
        peers={
            "liger": lambda: liger(q, k, angle, shape.backward),
            "flash-attn": lambda: flash_attn(angle),
        },
        bytes=None if shape.backward else numbers * q.itemsize + coordinates * 8,
        backward=shape.backward,
    )


def places(shape, device) -> dict:
    """Arguments of the op for an image of this shape, with Lumina-Next's axes."""
    axes = ("h", "w")
    return {
        "positions": positions(1, shape.side, shape.side, device),
        "inv_freq": rope_frequencies(shape.K, axes, device=device),
        "axis": rope_axes(shape.K, axes, device=device),
    }


def angles(positions, inv_freq, axis):
    """Angle of every pair of a head, (L, K/2)."""
    return positions[:, axis] * inv_freq


def complex_table(angle):
    """Rotations as complex numbers, (L, 1, K/2). diffusers' pipelines compute them once for all
    steps."""
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def rotate(x, table):
    """A product of complex numbers, as in diffusers' Lumina-Next."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(3).to(x.dtype)


def liger(q, k, angle, backward):
    if not angle.is_cuda:
        raise Unavailable("Liger's kernels run only on a GPU")
    if backward:
        raise Unavailable("Liger's kernel overwrites q and k, which the other variants need")
    from liger_kernel.ops.llama4_rope import LigerLlama4RopeFunction as Rotation

    table, own_q, own_k = complex_table(angle)[:, 0], q.clone(), k.clone()
    # Every call rotates the same copies further; the numbers keep their size.
    return lambda q, k: Rotation.apply(own_q, own_k, table)


def flash_attn(angle):
    if not angle.is_cuda:
        raise Unavailable("flash-attn's rotation runs only on a GPU")
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = angle.cos(), angle.sin()
    return lambda q, k: tuple(apply_rotary_emb(x, cos, sin, interleaved=True) for x in (q, k))


def test_rope3d(compare):
    compare(case)
