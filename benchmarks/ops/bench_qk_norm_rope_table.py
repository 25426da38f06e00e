"""qk_norm_rope_table: LayerNorm of queries and keys, then their rotation by cos/sin tables."""

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.ops.bench_qk_norm_rope3d import SHAPES as SHAPES
from benchmarks.ops.bench_qk_norm_rope3d import normalise, parameters
from benchmarks.ops.bench_rope3d import angles, places
from benchmarks.ops.bench_rope_table import rotate

PEERS = ()


def case(shape, device) -> Case:
    B, L, H, G, K, randn = shape.B, shape.L, shape.H, shape.G, shape.K, shape.randn(device)
    angle = angles(**places(shape, device))
    cos, sin = (z.repeat_interleave(2, -1) for z in (angle.cos(), angle.sin()))

    def eager(q, k, q_weight, q_bias, k_weight, k_bias):
        q, k = normalise(q, q_weight, q_bias), normalise(k, k_weight, k_bias)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    q, k = randn(B, L, H, K), randn(B, L, G, K)
    numbers = 2 * B * L * (H + G) * K + 2 * (H + G) * K
    return Case(
        inputs={"q": q, "k": k, **parameters(shape, device)},
        ours=ours(lk.qk_norm_rope_table, device, cos=cos, sin=sin),
        eager=eager,
        bytes=None if shape.backward else numbers * q.itemsize + 2 * L * K * 4,
        backward=shape.backward,
    )


def test_qk_norm_rope_table(compare):
    compare(case)
