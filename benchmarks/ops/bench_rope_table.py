"""rope_table: the rotation of queries and keys by cos/sin tables of the model."""

import torch

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES
from benchmarks.ops.bench_rope3d import angles, flash_attn, liger, places

SHAPES = (*OP_SHAPES, *BACKWARD_SHAPES)
PEERS = ("liger", "flash-attn")


def case(shape, device) -> Case:
    B, L, H, G, K, randn = shape.B, shape.L, shape.H, shape.G, shape.K, shape.randn(device)
    q, k = randn(B, L, H, K), randn(B, L, G, K)
    angle = angles(**places(shape, device))
    cos, sin = (z.repeat_interleave(2, -1) for z in (angle.cos(), angle.sin()))

    def eager(q, k):
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return Case(
        inputs={"q": q, "k": k},
        ours=ours(lk.rope_table, device, cos=cos, sin=sin),
        eager=eager,
        peers={
            "liger": lambda: liger(q, k, angle, shape.backward),
            "flash-attn": lambda: flash_attn(angle),
        },
        bytes=None if shape.backward else 2 * B * L * (H + G) * K * q.itemsize + 2 * L * K * 4,
        backward=shape.backward,
    )


def rotate(x, cos, sin):
    """Real arithmetic, as in diffusers' Flux."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-b, a), -1).flatten(3)  # by 90 degrees
    return (x.float() * cos[:, None] + rotated.float() * sin[:, None]).to(x.dtype)


def test_rope_table(compare):
    compare(case)
