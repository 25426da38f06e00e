"""How the launchers in csrc/cuda launch the kernels that `benchmarks.cuda_code` predicts, and what
these must move and compute."""

from dataclasses import dataclass
from math import ceil

from benchmarks.harness.shapes import Shape


@dataclass(frozen=True)
class Launched:
    """A kernel with its template arguments, in bfloat16 (2)."""

    kernel: str  # without "_kernel"
    arguments: str
    grid: int
    threads: int  # of a block, that take part in its work
    shared: int  # bytes of dynamic shared memory
    bytes: int
    flops: int = 0  # of matrix products
    useful: float = 1.0  # share of its tensor-core instructions that is not padding
    note: str = ""  # of launches of one kernel, which this is

    @property
    def names(self) -> tuple[str, str]:
        return f"{self.kernel}_kernel", self.arguments


def launches(shape: Shape) -> list[Launched]:
    """For heads of 72 channels, a norm across heads, context drop by 2 x 2."""
    B, L, H, G, K = shape.B, shape.L, shape.H, shape.G, shape.K
    rows, F = B * L, shape.F
    flat, queries, keys = rows * F * 2, rows * H * K * 2, rows * G * K * 2
    tables, windows = 8 * L * K, rows // 4
    pieces = ceil(K / 8)
    token = 32 * ceil(pieces * ceil((H + G) / 2) / 32)  # threads, of two heads each
    pool = 2 * (queries + keys) + keys + 2 * (keys // 4)  # q twice, k and v, their means
    q_threads, k_threads = 32 * ceil(pieces * H / 32), 2 * 32 * ceil(pieces * G / 32)
    sums = {heads: 512 * 2 * heads * K * 4 for heads in (H, G)}  # of weights and of biases
    table = 14304  # two tokens' rows, their entries, scratch
    return [
        Launched("swiglu_fwd", "", flat // 8192, 256, 0, 3 * flat),
        Launched("swiglu_bwd", "", flat // 8192, 256, 0, 5 * flat),
        Launched("gelu_fwd", "1", flat // 8192, 256, 0, 2 * flat),
        Launched("gelu_bwd", "1", flat // 8192, 256, 0, 3 * flat),
        Launched("rope3d", "", rows, token, 32 * pieces, 2 * (queries + keys)),
        Launched("rope_table", "1, 0", rows, token, 0, 2 * (queries + keys) + tables),
        Launched("qk_norm_rope3d", "2", rows // 2, token, 864, 2 * (queries + keys)),
        Launched(
            "qk_norm_rope_table", "2", rows // 2, token, table, 2 * (queries + keys) + tables
        ),
        Launched("qk_norm_rope3d_pool", "2", windows, token, 864, pool),
        Launched(
            "qk_norm_rope3d_bwd", "1", 512, q_threads, 32 * q_threads, 3 * queries + sums[H],
            note="of q",
        ),
        Launched(
            "qk_norm_rope3d_bwd", "1", 512, k_threads, 32 * k_threads, 3 * keys + sums[G],
            note="of k",
        ),
        Launched("context_drop", "", windows, 160, 0, 2 * (keys + keys // 4)),
        Launched("context_drop_bwd", "", windows, 160, 0, 2 * (keys + keys // 4)),
        *attention(shape, queries, keys),
    ]  # fmt: skip


def attention(shape: Shape, queries: int, keys: int) -> list[Launched]:
    """Without text, mask and bias; the bytes are those of q, and of k. Split: the first sample's
    first 256 rows alone, whose 64 blocks take four parts of the keys."""
    B, L, H, G, K = shape.B, shape.L, shape.H, shape.G, shape.K
    product = 2 * B * L * L * H * K
    row_blocks, forward = B * G * ceil(L * (H // G) / 128), 2 * queries + 2 * keys
    stats, terms = 8 * B * L * H, 16 * B * L * H
    backward = queries * 3 + 2 * keys + terms  # of dq
    few, parts, padded = 256, 4, 2 * 72 / (80 + 72)  # of a forward
    sums = 4 * parts * few * H * K
    return [
        Launched(
            "gqa_attention_fwd", f"{K}, 2, 0, 0", row_blocks, 128, 36864, forward, 2 * product,
            padded,
        ),
        # Three warp groups multiply; what the fourth one's copies cost is not predicted.
        Launched(
            "gqa_attention_hopper_fwd", f"{K}, 2", B * G * ceil(L * (H // G) / 192), 384, 163840,
            forward, 2 * product, padded,
        ),
        Launched(
            "gqa_attention_terms", "", B * L * H // 32, 128, 0,
            2 * queries + queries // 2 + stats + terms,
        ),
        Launched(
            "gqa_attention_dq", f"{K}, 2, 0", row_blocks, 128, 36864, backward, 3 * product,
            3 * 72 / (2 * 80 + 72),
        ),
        Launched(
            "gqa_attention_dkv", f"{K}, 2, 0", B * G * ceil(L / 128), 128, 37888,
            2 * queries + 4 * keys + terms, 4 * product, 4 * 72 / (2 * 80 + 2 * 72),
        ),
        Launched(
            "gqa_attention_split", f"{K}, 2", parts * G * ceil(few * (H // G) / 128), 128, 36864,
            2 * few * H * K + 2 * keys // B + sums, 4 * few * L * H * K, padded,
        ),
        Launched(
            "gqa_attention_combine", "", few * H * ceil(K / 8) // 128, 128, 0,
            sums + 3 * few * H * K,
        ),
    ]  # fmt: skip
