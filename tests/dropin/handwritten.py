"""A diffusion transformer of no library, with its parts written out as functions."""

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x, weight, eps=1e-6):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_weight = nn.Parameter(torch.ones(dim // heads))
        self.k_weight = nn.Parameter(torch.ones(dim // heads))
        self.proj = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.ada = nn.Linear(dim, 6 * dim)

    def forward(self, x, c, cos, sin):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(c)).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attend(modulate(self.norm1(x), shift1, scale1), cos, sin)
        value, gate = self.up(modulate(self.norm2(x), shift2, scale2)).chunk(2, dim=-1)
        return x + gate2[:, None] * self.down(value * F.gelu(gate))

    def attend(self, x, cos, sin):
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q = apply_rotary(rms_norm(q, self.q_weight), cos, sin)
        k = apply_rotary(rms_norm(k, self.k_weight), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, L, D))


class DiT(nn.Module):
    """x (B, C, H, W), t (B,) and labels (B,) to (B, C, H, W)."""

    def __init__(self, channels, dim, layers, heads, classes=10):
        super().__init__()
        self.head_dim = dim // heads
        self.patches = nn.Conv2d(channels, dim, 2, stride=2)
        self.time = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ada = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, 4 * channels)

    def tables(self, length, like):
        speed = 10000.0 ** -(torch.arange(0, self.head_dim, 2, device=like.device) / self.head_dim)
        angles = torch.arange(length, device=like.device)[:, None] * speed
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, x, t, labels):
        h, w = (n // 2 for n in x.shape[2:])
        angles = 1000 * t[:, None].float() * 10000.0 ** -(torch.arange(32, device=x.device) / 32)
        time = torch.cat((angles.cos(), angles.sin()), dim=-1).to(x.dtype)
        x = self.patches(x).flatten(2).transpose(1, 2)
        c = self.time(time) + self.label(labels)
        cos, sin = self.tables(h * w, x)
        for block in self.blocks:
            x = block(x, c, cos, sin)
        shift, scale = self.ada(F.silu(c)).chunk(2, dim=-1)
        x = self.out(modulate(self.norm(x), shift, scale)).unflatten(1, (h, w))
        return F.pixel_shuffle(x.permute(0, 3, 1, 2), 2)
