"""sandwich_norm_chain: the tail of one sub-layer of Lumina-Next and the head of the next."""

import torch
from torch.nn import functional as F

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES

SHAPES = (*OP_SHAPES, *BACKWARD_SHAPES)
PEERS = ()


def case(shape, device) -> Case:
    B, L, D, randn = shape.B, shape.L, shape.D, shape.randn(device)
    y, residual, weight, next_weight = randn(B, L, D), randn(B, L, D), randn(D), randn(D)
    _, gate, next_scale, _ = randn(B, 4 * D).chunk(4, 1)

    def eager(y, residual, weight, gate, next_weight, next_scale):
        new = residual + torch.tanh(gate)[:, None] * F.rms_norm(y, (D,), weight, 1e-5)
        return new, F.rms_norm(new, (D,), next_weight, 1e-5) * (1 + next_scale[:, None])

    return Case(
        inputs={
            "y": y, "residual": residual, "weight": weight, "gate": gate,
            "next_weight": next_weight, "next_scale": next_scale,
        },
        ours=ours(lk.sandwich_norm_chain, device),
        eager=eager,
        bytes=None if shape.backward else (4 * B * L * D + 2 * D + 2 * B * D) * y.itemsize,
        backward=shape.backward,
    )  # fmt: skip


def test_sandwich_norm_chain(compare):
    compare(case)
