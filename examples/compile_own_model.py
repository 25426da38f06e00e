"""A diffusion transformer of your own, with the fused ops put into it by torch.compile.

The model below is plain PyTorch and knows nothing of this package. The first call takes as long as
Inductor needs to compile what is left.
"""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu


class Block(nn.Module):
    """Attention and a gated FFN, both modulated by the time embedding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, time_embedding: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        modulation = self.modulation(silu(time_embedding))[:, None].chunk(6, dim=-1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        x = x + gate * self.attend(self.norms[0](x) * (1 + scale) + shift, *rotation)
        h = self.norms[1](x) * (1 + ffn_scale) + ffn_shift
        return x + ffn_gate * self.down(silu(self.gate(h)) * self.up(h))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, H, K)
        q = rotate(rms_norm(q, q.shape[-1:], self.q_weight, 1e-6), cos, sin)
        k = rotate(rms_norm(k, k.shape[-1:], self.k_weight, 1e-6), cos, sin)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of each head by tables (L, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class DiT(nn.Module):
    def __init__(self, channels=16, width=384, heads=6, depth=2):
        super().__init__()
        self.read, self.write = nn.Linear(channels, width), nn.Linear(width, channels)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head_dim = width // heads

    def forward(self, patches: Tensor, t: Tensor) -> Tensor:
        """Patches (B, L, C) and times (B,) to the velocity, (B, L, C)."""
        positions = torch.arange(patches.shape[1], device=patches.device)
        steps = torch.arange(self.head_dim // 2, device=patches.device) * 2 / self.head_dim
        angles = torch.outer(positions, 10000.0**-steps).repeat(1, 2)  # (L, K)
        rotation = angles.cos().to(patches.dtype), angles.sin().to(patches.dtype)
        x, time_embedding = self.read(patches), self.time(t[:, None])
        for block in self.blocks:
            x = block(x, time_embedding, rotation)
        return self.write(x)


@torch.no_grad()
def seconds(*runs, repeats: int = 7) -> list[float]:
    """The medians of some runs of each, by turns."""
    times = [[] for _ in runs]
    for _ in range(repeats):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DiT().to(device, torch.bfloat16).eval()
    patches, t = (x.to(device, torch.bfloat16) for x in (torch.randn(2, 256, 16), torch.rand(2)))
    compiled = torch.compile(model, backend="lumina_kernels")
    with torch.no_grad():
        want, got = model(patches, t), compiled(patches, t)
    change = (got - want).float().norm() / want.float().norm()
    print(f"relative change of the result {change:.1e}")  # of bfloat16's rounding
    plain, fused = seconds(lambda: model(patches, t), lambda: compiled(patches, t))
    print(f"eager {plain * 1e3:.1f} ms, compiled {fused * 1e3:.1f} ms")
