"""gate_residual_norm: the gated residual after Flux's attention and the adaLN before its FFN."""

from torch.nn import functional as F

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES

SHAPES = (*OP_SHAPES, *BACKWARD_SHAPES)
PEERS = ()


def case(shape, device) -> Case:
    B, L, D, randn = shape.B, shape.L, shape.D, shape.randn(device)
    y, residual = randn(B, L, D), randn(B, L, D)
    _, _, gate, shift, scale, _ = randn(B, 6 * D).chunk(6, 1)

    def eager(y, residual, gate, scale, shift):
        new = residual + gate[:, None] * y
        normed = F.layer_norm(new, (D,), eps=1e-6)
        return new, normed * (1 + scale[:, None]) + shift[:, None]

    return Case(
        inputs={"y": y, "residual": residual, "gate": gate, "scale": scale, "shift": shift},
        ours=ours(lk.gate_residual_norm, device),
        eager=eager,
        bytes=None if shape.backward else (4 * B * L * D + 3 * B * D) * y.itemsize,
        backward=shape.backward,
    )


def test_gate_residual_norm(compare):
    compare(case)
