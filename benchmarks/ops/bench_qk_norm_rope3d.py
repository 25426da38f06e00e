"""qk_norm_rope3d: LayerNorm of queries and keys as in Lumina-Next, then their rotation."""

from torch.nn import functional as F

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, CPU, OP_SHAPES
from benchmarks.ops.bench_rope3d import angles, complex_table, places, rotate

SHAPES = (
    *OP_SHAPES,
    # On a CPU in 16 bits, the bias gradient of PyTorch's LayerNorm is 80 % off.
    *(shape.but(dtype="float32") if shape.devices == CPU else shape for shape in BACKWARD_SHAPES),
)
PEERS = ()


def case(shape, device) -> Case:
    B, L, H, G, K, randn = shape.B, shape.L, shape.H, shape.G, shape.K, shape.randn(device)
    q, k = randn(B, L, H, K), randn(B, L, G, K)
    place = places(shape, device)
    table = complex_table(angles(**place))

    def eager(q, k, q_weight, q_bias, k_weight, k_bias):
        q, k = normalise(q, q_weight, q_bias), normalise(k, k_weight, k_bias)
        return rotate(q, table), rotate(k, table)

    coordinates = 3 * L
    numbers = 2 * B * L * (H + G) * K + 2 * (H + G) * K
    return Case(
        inputs={"q": q, "k": k, **parameters(shape, device)},
        ours=ours(lk.qk_norm_rope3d, device, **place),
        eager=eager,
        bytes=None if shape.backward else numbers * q.itemsize + coordinates * 8,
        backward=shape.backward,
    )


def parameters(shape, device) -> dict:
    """Weights and biases of both norms."""
    randn, q_width, k_width = shape.randn(device), shape.H * shape.K, shape.G * shape.K
    return {
        "q_weight": randn(q_width),
        "q_bias": randn(q_width),
        "k_weight": randn(k_width),
        "k_bias": randn(k_width),
    }


def normalise(x, weight, bias):
    """LayerNorm across all heads of a token."""
    return F.layer_norm(x.flatten(2), weight.shape, weight, bias).view(x.shape)


def test_qk_norm_rope3d(compare):
    compare(case)
