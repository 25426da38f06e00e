"""sandwich_norm: the gated residual norm at the tail of every sub-layer of Lumina-Next."""

import torch
from torch.nn import functional as F

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES

SHAPES = (*OP_SHAPES, *BACKWARD_SHAPES)
PEERS = ()


def case(shape, device) -> Case:
    B, L, D, randn = shape.B, shape.L, shape.D, shape.randn(device)
    y, residual, weight = randn(B, L, D), randn(B, L, D), randn(D)
    gate = randn(B, 4 * D).chunk(4, 1)[1]

    def eager(y, residual, weight, gate):
        return residual + torch.tanh(gate)[:, None] * F.rms_norm(y, (D,), weight, 1e-5)

    return Case(
        inputs={"y": y, "residual": residual, "weight": weight, "gate": gate},
        ours=ours(lk.sandwich_norm, device),
        eager=eager,
        bytes=None if shape.backward else (3 * B * L * D + D + B * D) * y.itemsize,
        backward=shape.backward,
    )


def test_sandwich_norm(compare):
    compare(case)
