"""The configurations that are tried, by kernel."""

from dataclasses import dataclass

from benchmarks.harness.shapes import FLUX, LUMINA_2, LUMINA_NEXT, Z_IMAGE, Shape

# Rows of queries, keys, warps, stages, keys of a step where there is masking.
FORWARD = (
    (64, 64, 4, 3, 32), (128, 64, 4, 3, 32), (128, 128, 8, 3, 32), (128, 64, 8, 3, 32),
    (128, 64, 4, 2, 32), (64, 128, 4, 2, 32), (128, 32, 4, 3, 32), (64, 64, 4, 4, 32),
    (128, 128, 8, 2, 32), (64, 32, 4, 3, 32),
)  # fmt: skip
DQ = (
    (64, 64, 4, 3, 32), (128, 64, 8, 3, 32), (64, 32, 4, 3, 16), (64, 64, 4, 2, 32),
    (128, 32, 4, 3, 32), (64, 128, 4, 2, 32), (128, 64, 8, 2, 32),
)  # fmt: skip
DKV = (
    (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 3), (128, 64, 4, 2), (32, 64, 4, 3),
    (64, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 3),
)  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """Configurations of a kernel for one shape, and how the table names the kernel and its size."""

    op: str
    kernel: str
    size: int
    shape: Shape
    configurations: tuple[dict, ...]


def tiles(rows, keys, warps, stages, *edge) -> dict:
    sizes = {"BLOCK_M": rows, "BLOCK_N": keys} | ({"EDGE": edge[0]} if edge else {})
    return sizes | {"num_warps": warps, "num_stages": stages}


def with_registers(warps: int) -> dict:
    """As the launchers of backward kernels do it."""
    return {"num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps))}


FORWARD_TILES, DQ_TILES, DKV_TILES = (
    tuple(tiles(*sizes) for sizes in kind) for kind in (FORWARD, DQ, DKV)
)
ROW_TILES = tuple(
    {"ROWS": rows, "num_warps": warps}
    for warps, rows in ((4, 1), (4, 2), (8, 1), (2, 1), (8, 2), (8, 4), (4, 4), (4, 8), (1, 1))
)
WARPS = tuple({"num_warps": warps} for warps in (1, 2, 4, 8))
REGISTERS = tuple(with_registers(warps) for warps in (2, 4, 8, 16))
FLAT = tuple(
    {"BLOCK": block, "num_warps": warps}
    for block, warps in ((512, 4), (1024, 4), (1024, 2), (2048, 4), (2048, 8), (4096, 8))
)
NORMS = ("sandwich_norm_chain", "norm_modulate", "gate_residual_norm", "sandwich_norm")


def attention(shape: Shape):
    """Its three kernels, for a model's head_dim."""
    size = next(most for most in (64, 96, 128, 256) if shape.K <= most)
    back = shape.but(backward=True)
    yield Candidates("gqa_attention", "gqa_attention_fwd", size, shape, FORWARD_TILES)
    yield Candidates("gqa_attention", "gqa_attention_dkv", size, back, DKV_TILES)
    yield Candidates("gqa_attention", "gqa_attention_dq", size, back, DQ_TILES)


def others(shape: Shape):
    """The kernels of the other ops, for a model's width."""
    D, heads, back = shape.D, shape.H * shape.K, shape.but(backward=True)
    for op in NORMS:
        yield Candidates(op, f"{op}_fwd", D, shape, ROW_TILES)
    yield Candidates("qk_norm_rope3d", "qk_norm_rope3d_fwd", heads, shape, WARPS)
    yield Candidates("qk_norm_rope_table", "qk_norm_rope_table_fwd", heads, shape, WARPS)
    yield Candidates("swiglu", "swiglu_fwd", 1, shape, FLAT)
    yield Candidates("gelu", "gelu_fwd", 1, shape, FLAT)
    yield Candidates("rope3d", "rope3d", heads, shape, WARPS)
    yield Candidates("rope_table", "rope_table", heads, shape, WARPS)
    pooled = shape.but(drop=2)
    pool = "qk_norm_rope3d_pool"
    yield Candidates(pool, f"{pool}_fwd", heads, pooled, REGISTERS)
    yield Candidates("context_drop", "context_drop_fwd", shape.G * shape.K, pooled, REGISTERS)
    for op in NORMS:
        yield Candidates(op, f"{op}_bwd", D, back, REGISTERS)
    yield Candidates("qk_norm_rope3d", "qk_norm_rope3d_bwd", heads, back, REGISTERS)
    yield Candidates("qk_norm_rope_table", "qk_norm_rope_table_bwd", heads, back, REGISTERS)
    of_keys, back_pooled = shape.G * shape.K, back.but(drop=2)
    yield Candidates("context_drop", "context_drop_bwd", of_keys, back_pooled, REGISTERS)
    yield Candidates("swiglu", "swiglu_bwd", 1, back, FLAT)
    yield Candidates("gelu", "gelu_bwd", 1, back, FLAT)


def all_candidates(model: Shape = LUMINA_NEXT, more: tuple = (LUMINA_2, FLUX, Z_IMAGE)):
    """In the order of what they decide: the model's attention with and without text, its other ops,
    then other models."""
    yield from attention(model.but(text=True))
    yield from attention(model)
    yield from others(model)
    for other in more:
        yield from attention(other)
    for other in more:
        yield from others(other)
