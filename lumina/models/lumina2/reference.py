"""Lumina-Image 2.0 in plain PyTorch: what `lumina.Lumina2` and its kernels are tested against.

No kernels, no tricks; runs in float64. Norms, rotation, FFN and embedding of the time are those of
the reference of Next-DiT. After "Lumina-Image 2.0: A Unified and Efficient Image Generative
Framework" (arXiv 2503.21758) and its released model; parameters carry the names of that checkpoint.
Every image runs alone, with the tokens of its text and no others. B batch, L tokens, D width, H
query heads, G key/value heads, K head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.models.next_dit.reference import (
    FeedForward,
    FinalLayer,
    RMSNorm,
    TimestepEmbedder,
    rotate,
)


class Lumina2(nn.Module):
    """The velocity network; `forward` takes and returns what `lumina.Lumina2.forward` does."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        D, A, Y = config.dim, config.cond_dim, config.cap_feat_dim
        volume = config.patch_size**2 * config.in_channels
        self.x_embedder = nn.Linear(volume, D)
        self.t_embedder = TimestepEmbedder(A)
        self.cap_embedder = nn.Sequential(RMSNorm(Y, config.norm_eps), nn.Linear(Y, D))
        refiners = range(config.n_refiner_layers)
        self.noise_refiner = nn.ModuleList(self.block() for _ in refiners)
        self.context_refiner = nn.ModuleList(Block(config, None) for _ in refiners)
        self.layers = nn.ModuleList(self.block() for _ in range(config.n_layers))
        self.final_layer = FinalLayer(D, A, volume)

    def block(self):
        # SiLU is in c already.
        return Block(
            self.config,
            nn.Sequential(nn.Identity(), nn.Linear(self.config.cond_dim, 4 * self.config.dim)),
        )

    def forward(self, x, t, cap_feats, cap_mask, **options):
        args = zip(x, t, cap_feats, cap_mask, strict=True)
        out = [self.one(xi, ti[None], f[m], **options) for xi, ti, f, m in args]
        return torch.stack(out) if isinstance(x, Tensor) else out

    def one(self, x, t, feats, rope_scaling=None, base_seqlen=None, context_drop=None):
        """The velocity of one image (C, H, W), whose text has features (T, Y) and no padding."""
        image, grid = patches(x, self.config.patch_size)
        n, (h, w) = len(feats), grid
        image_at = torch.tensor([(n, r, c) for r in range(h) for c in range(w)])
        text_at = torch.tensor([(i, 0, 0) for i in range(n)]).reshape(n, 3)
        c = F.silu(self.t_embedder(t.to(x.dtype)))
        options = rope_scaling, base_seqlen, context_drop
        return self.velocity(x, t, grid, (image, image_at), (feats, text_at), c, c, options)

    def velocity(self, x, t, grid, image, text, c, final_c, options, pads=None):
        """image and text: tokens before their embedding, and their positions (L, 3).

        pads: embedded tokens behind the image's, and their positions.
        """
        (image, image_at), (feats, text_at) = image, text
        rope_scaling, base_seqlen, context_drop = options
        turn = lambda at: rotations(self.config, at, grid, rope_scaling, t)  # noqa: E731
        text = self.embed_text(feats)[None]
        for block in self.context_refiner:
            text = block(text, None, rotations(self.config, text_at, grid, None, t))
        h = self.x_embedder(image)[None]
        L = h.shape[1]
        if pads is not None:
            h, image_at = torch.cat([h, pads[0][None]], 1), torch.cat([image_at, pads[1]])
        for block in self.noise_refiner:
            h = block(h, c, turn(image_at))
        h, at = torch.cat([h, text], 1), torch.cat([image_at, text_at])
        scale = 1.0
        if base_seqlen is not None:  # proportional attention
            scale = math.sqrt(math.log(L) / math.log(base_seqlen))
        pooled = [False] * len(self.layers) if context_drop is None else context_drop.layers
        averages = None
        if context_drop is not None:
            averages = window_averages(grid, h.shape[1], context_drop)
        for block, pool in zip(self.layers, pooled, strict=True):
            h = block(h, c, turn(at), scale, averages if pool else None)
        out = self.final_layer(h[:, :L], final_c)
        p = self.config.patch_size
        out = out.reshape(*grid, p, p, -1).permute(4, 0, 2, 1, 3)  # a patch is (pH, pW, C)
        return out.reshape(x.shape)

    def embed_text(self, feats):
        return self.cap_embedder(feats)


class Block(nn.Module):
    """x + tanh(gate) * norm2(layer(norm1(x) * (1 + scale))), for attention, then for the FFN."""

    def __init__(self, config, modulation):
        super().__init__()
        D, eps = config.dim, config.norm_eps
        self.attention = Attention(config)
        self.feed_forward = FeedForward(D, config.ffn_dim)
        self.attention_norm1, self.attention_norm2 = RMSNorm(D, eps), RMSNorm(D, eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(D, eps), RMSNorm(D, eps)
        if modulation is not None:
            self.adaLN_modulation = modulation

    def forward(self, x, c, rotation, scale=1.0, averages=None):
        if c is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rotation))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 4 D)
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        h = self.attention(self.attention_norm1(x) * (1 + scale_msa), rotation, scale, averages)
        x = x + gate_msa.tanh() * self.attention_norm2(h)
        h = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))
        return x + gate_mlp.tanh() * self.ffn_norm2(h)


class Attention(nn.Module):
    """softmax(q kT scale / sqrt(K)) v; q and k are normed per head, then rotated."""

    def __init__(self, config):
        super().__init__()
        D, K = config.dim, config.head_dim
        self.heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        self.head_dim = K
        self.qkv = nn.Linear(D, sum(self.heads) * K, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.q_norm, self.k_norm = RMSNorm(K, 1e-5), RMSNorm(K, 1e-5)

    def forward(self, x, rotation, scale=1.0, averages=None):
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        bias = 0.0
        if averages is not None:  # context drop
            means, bias = averages
            k, v = (torch.einsum("ml,blhk->bmhk", means.to(z.dtype), z) for z in (k, v))
        k, v = (z.repeat_interleave(self.heads[0] // self.heads[1], dim=2) for z in (k, v))
        scores = torch.einsum("blhk,bmhk->bhlm", q, k) * (scale * self.head_dim**-0.5)
        weights = (scores + bias).softmax(dim=-1).to(v.dtype)
        return self.out(torch.einsum("bhlm,bmhk->blhk", weights, v).flatten(2))


def patches(x: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """(h w, side side C) for one image (C, H, W), and (h, w)."""
    C, h, w = x.shape[0], x.shape[1] // side, x.shape[2] // side
    x = x.reshape(C, h, side, w, side).permute(1, 3, 2, 4, 0)
    return x.reshape(h * w, side * side * C), (h, w)


def window_averages(grid, tokens: int, drop) -> tuple[Tensor, Tensor | float]:
    """Means over factor x factor tokens of the image as a matrix (L', L); the bias of its rows.

    The `tokens` behind the image's stay as they are.
    """
    r, c = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    window = torch.stack([r // drop.factor, c // drop.factor], dim=-1).flatten(0, 1)  # (L, 2)
    every, counts = window.unique(dim=0, return_counts=True)
    member = (every[:, None] == window).all(-1).double() / counts[:, None]  # (L', L)
    others = tokens - len(window)
    means = torch.block_diag(member, torch.eye(others, dtype=torch.float64))
    bias = torch.cat([counts.double().log(), torch.zeros(others, dtype=torch.float64)])
    return means, bias if drop.log_count else 0.0


def rotations(config, at: Tensor, grid, scaling, t: Tensor) -> Tensor:
    """exp(i angle), (1, L, 1, K/2), at positions (L, 3).

    Axis i rotates its own block of a channels: pair k of it by position * theta^(-2 k / a).
    """
    angles = []
    for axis, a in enumerate(config.axes_dims):
        e = torch.arange(0, a, 2).double() / a
        freqs = config.rope_theta**-e
        if axis > 0 and scaling is not None:  # the text is not stretched
            freqs = stretched(config, freqs, e, math.sqrt(grid[0] * grid[1]), scaling, t)
        angles.append(at[:, axis, None].double() * freqs)
    angles = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angles), angles)[None, :, None]


def stretched(config, freqs, e, side, scaling, t):
    """Frequencies for `side` tokens a side; as for Next-DiT, with the exponents e of the block."""
    theta, K = config.rope_theta, config.head_dim
    s = max(1.0, side / scaling.base_size) if scaling.factor is None else scaling.factor
    linear, ntk = freqs / s, freqs * s**-e
    if scaling.kind == "linear":
        return linear
    if scaling.kind == "ntk":
        return ntk
    if scaling.kind == "watershed":
        return linear if t.item() < scaling.watershed else ntk
    if scaling.kind == "frequency_aware":
        d = K * math.log(scaling.base_size / (2 * math.pi), theta)
    elif scaling.kind == "time_aware":
        d = (K - 1) * t.item() + 1
    else:
        raise ValueError(f"unknown RoPE scaling {scaling.kind!r}")
    return torch.maximum(freqs * s ** -(e * K / d), linear)
