"""context_drop: averages keys and values over windows of 2 x 2 tokens."""

from math import ceil

from torch.nn import functional as F

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.harness.shapes import BACKWARD_SHAPES, OP_SHAPES

FACTOR = 2
SHAPES = tuple(shape.but(drop=FACTOR) for shape in (*OP_SHAPES, *BACKWARD_SHAPES))
PEERS = ("tomesd",)


def case(shape, device) -> Case:
    B, L, G, K, side, randn = shape.B, shape.L, shape.G, shape.K, shape.side, shape.randn(device)
    k, v = randn(B, L, G, K), randn(B, L, G, K)
    windows = ceil(side / shape.drop) ** 2

    def context_drop(**arguments):  # without a mask, the pooled mask and the counts are constant
        return lk.context_drop(**arguments)[:2]

    def eager(k, v):
        return pool(k, shape), pool(v, shape)

    return Case(
        inputs={"k": k, "v": v},
        ours=ours(context_drop, device, grid=(1, side, side), factor=shape.drop),
        eager=eager,
        peers={"tomesd": lambda: tomesd(shape)},
        not_equivalent=("tomesd",),
        bytes=None if shape.backward else 2 * B * (L + windows) * G * K * k.itemsize,
        backward=shape.backward,
    )


def pool(x, shape):
    """Means over windows of the grid, (B, L, G, K) -> (B, L', G, K)."""
    grid = x.flatten(2).transpose(1, 2).unflatten(2, (shape.side, shape.side))
    means = F.avg_pool2d(grid, shape.drop, ceil_mode=shape.side % shape.drop > 0)
    return means.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])


def tomesd(shape):
    """Token merging: merges the tokens whose keys are most alike, until as many are left as there
    are windows."""
    from tomesd.merge import bipartite_soft_matching_random2d

    side, drop = shape.side, shape.drop

    def merge_tokens(k, v):
        rows, values = k.flatten(2), v.flatten(2)
        merge, _ = bipartite_soft_matching_random2d(
            rows, side, side, drop, drop, r=shape.L, no_rand=True
        )
        return merge(rows).unflatten(2, k.shape[2:]), merge(values).unflatten(2, v.shape[2:])

    return merge_tokens


def test_context_drop(compare):
    compare(case)
