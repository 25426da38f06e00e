"""The CPU kernels against eager PyTorch and diffusers: python -m benchmarks.cpu_speed

Model: 8 layers of width 576, 8 query and 2 key/value heads of 72, batch 2, 64 text tokens. Medians
of interleaved runs in one process with equal threads; "floor" is the model's FLOPs at the rate of
torch's matrix product of the model's largest shape, measured in the same run.
"""

import argparse
import copy
import statistics
import tempfile
import time

import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import apply_rotary_emb, get_2d_rotary_pos_embed_lumina
from torch.nn import functional as F

import lumina
import lumina_kernels as lk
from lumina import flops
from lumina.config import NextDiTConfig
from lumina.rope import rope_axes, rope_frequencies

B, T, D, H, G, K, WIDTH = 2, 64, 576, 8, 2, 72, 256


def medians(rounds: int, calls: dict) -> dict:
    """Name -> seconds, the calls taking turns."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(tokens: int, dtype) -> float:
    """FLOP/s of the model's largest product."""
    x, weight = torch.randn(tokens, D).to(dtype), torch.randn(1536, D).to(dtype)
    seconds = medians(20, {"gemm": lambda: F.linear(x, weight)})["gemm"]
    return 2 * tokens * D * 1536 / seconds


def models(dtype) -> tuple:
    """Ours, and diffusers' with the same weights."""
    config = NextDiTConfig(dim=D, n_layers=8, n_heads=H, n_kv_heads=G, cap_feat_dim=WIDTH)
    ours = lumina.NextDiT(config).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        lumina.save(ours, folder, format="diffusers")
        theirs = LuminaNextDiT2DModel.from_pretrained(folder)
    return config, ours.to(dtype), theirs.eval().to(dtype)


def forward_rows(side: int, dtype, rounds: int) -> None:
    """Whole forwards of side x side tokens."""
    config, ours, theirs = models(dtype)
    x, t = torch.randn(B, 4, 2 * side, 2 * side).to(dtype), torch.rand(B)
    text, mask = torch.randn(B, T, WIDTH).to(dtype), torch.ones(B, T, dtype=torch.bool)
    table = get_2d_rotary_pos_embed_lumina(K, 2 * side, 2 * side)

    def call(model):
        return model(
            x, t.to(dtype), text, mask, image_rotary_emb=table, cross_attention_kwargs={},
            return_dict=False,
        )[0].chunk(2, 1)[0]  # fmt: skip

    compiled = copy.deepcopy(theirs)
    compiled.compile()
    torch._dynamo.reset()
    expected, out = call(theirs).float(), ours(x, t, text, mask).float()
    error = (out - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    seconds = medians(
        rounds,
        {
            "ours": lambda: ours(x, t, text, mask),
            "eager": lambda: call(theirs),
            "compile": lambda: call(compiled),
        },
    )
    total = flops.forward_flops(config, (2 * side, 2 * side), T) * B
    floor = total / matmul_rate(B * side * side, dtype)
    print(
        f"forward {dtype} L={side * side}: ours {1e3 * seconds['ours']:.1f} ms, "
        f"{seconds['eager'] / seconds['ours']:.2f} x diffusers eager, "
        f"{seconds['compile'] / seconds['ours']:.2f} x compiled; floor {1e3 * floor:.1f} ms, "
        f"{seconds['ours'] / floor:.2f} of it; difference {error:.1e}"
    )


def op_calls(L: int, dtype) -> dict:
    """Op -> ours, eager."""
    y, residual = torch.randn(B, L, D).to(dtype), torch.randn(B, L, D).to(dtype)
    weight, (scale, gate) = torch.randn(D).to(dtype), torch.randn(B, 2 * D).to(dtype).chunk(2, 1)
    q, k, v = (torch.randn(B, L, heads, K).to(dtype) for heads in (H, G, G))
    side = int(L**0.5)
    table = get_2d_rotary_pos_embed_lumina(K, side, side)[None].flatten(1, 2)
    rows = torch.arange(L)
    positions = torch.stack((0 * rows, rows // side, rows % side), 1)
    rope = positions, rope_frequencies(K, ("h", "w"), 10000.0), rope_axes(K, ("h", "w"))
    a, b = torch.randn(B, L, 1536).to(dtype), torch.randn(B, L, 1536).to(dtype)
    norms = [torch.randn(n).to(dtype) for n in (D, D, G * K, G * K)]

    def eager_chain():
        new = residual + torch.tanh(gate)[:, None] * F.rms_norm(y, (D,), weight, 1e-5)
        return new, F.rms_norm(new, (D,), weight, 1e-5) * (1 + scale[:, None])

    def eager_rope(q, k):
        return [apply_rotary_emb(x, table, use_real=False) for x in (q, k)]

    def eager_qk():
        rows = (
            F.layer_norm(q.flatten(2), (D,), *norms[:2]),
            F.layer_norm(k.flatten(2), (G * K,), *norms[2:]),
        )
        return eager_rope(rows[0].view(q.shape), rows[1].view(k.shape))

    def sdpa():
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, enable_gqa=True)

    mask = (rows < L * 3 // 4).expand(B, L)
    return {
        "gqa_attention": (lambda: lk.gqa_attention(q, k, v), sdpa),
        "gqa_attention, 3/4 of the keys": (lambda: lk.gqa_attention(q, k, v, mask), sdpa),
        "sandwich_norm_chain": (
            lambda: lk.sandwich_norm_chain(y, residual, weight, gate, weight, scale), eager_chain),
        "norm_modulate": (
            lambda: lk.norm_modulate(y, weight, scale=scale),
            lambda: F.rms_norm(y, (D,), weight, 1e-5) * (1 + scale[:, None])),
        "rope3d": (lambda: lk.rope3d(q, k, *rope), lambda: eager_rope(q, k)),
        "qk_norm_rope3d": (lambda: lk.qk_norm_rope3d(q, k, *norms, *rope), eager_qk),
        "swiglu": (lambda: lk.swiglu(a, b), lambda: F.silu(a) * b),
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ops", action="store_true", help="the ops alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in (torch.bfloat16, torch.float32):
        for side in (32, 64):
            for op, (ours, eager) in op_calls(side * side, dtype).items():
                seconds = medians(args.rounds, {"ours": ours, "eager": eager})
                print(
                    f"{op} {dtype} L={side * side}: {1e3 * seconds['ours']:.2f} ms, "
                    f"{seconds['eager'] / seconds['ours']:.2f} x eager"
                )
            if not args.ops:
                forward_rows(side, dtype, max(3, args.rounds // (side // 16)))


if __name__ == "__main__":
    main()
