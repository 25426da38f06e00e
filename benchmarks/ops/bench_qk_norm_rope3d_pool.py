"""qk_norm_rope3d_pool: qk_norm_rope3d, then context_drop of the keys and values."""

from math import ceil

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.ops import bench_qk_norm_rope3d
from benchmarks.ops.bench_context_drop import pool
from benchmarks.ops.bench_qk_norm_rope3d import normalise, parameters
from benchmarks.ops.bench_rope3d import angles, complex_table, places, rotate

SHAPES = tuple(shape.but(drop=2) for shape in bench_qk_norm_rope3d.SHAPES)
PEERS = ()


def case(shape, device) -> Case:
    B, L, H, G, K, side = shape.B, shape.L, shape.H, shape.G, shape.K, shape.side
    randn = shape.randn(device)
    q, k, v = randn(B, L, H, K), randn(B, L, G, K), randn(B, L, G, K)
    place = places(shape, device)
    table = complex_table(angles(**place))
    windows = ceil(side / shape.drop) ** 2

    def qk_norm_rope3d_pool(**arguments):  # without a mask, mask and counts are constant
        return lk.qk_norm_rope3d_pool(**arguments)[:3]

    def eager(q, k, v, q_weight, q_bias, k_weight, k_bias):
        q = rotate(normalise(q, q_weight, q_bias), table)
        k = rotate(normalise(k, k_weight, k_bias), table)
        return q, pool(k, shape), pool(v, shape)

    coordinates = 3 * L
    numbers = 2 * B * (L * H + L * G + windows * G) * K + 2 * (H + G) * K
    return Case(
        inputs={"q": q, "k": k, "v": v, **parameters(shape, device)},
        ours=ours(qk_norm_rope3d_pool, device, **place, grid=(1, side, side), factor=shape.drop),
        eager=eager,
        bytes=None if shape.backward else numbers * q.itemsize + coordinates * 8,
        backward=shape.backward,
    )


def test_qk_norm_rope3d_pool(compare):
    compare(case)
