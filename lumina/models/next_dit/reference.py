"""Next-DiT in plain PyTorch: what `lumina.NextDiT` and its kernels are tested against.

One file, no kernels, no tricks, nothing of ours imported; runs in float64. After "Lumina-Next:
Making Lumina-T2X Stronger and Faster with Next-DiT" (arXiv 2406.18583) and its released
text-to-image model; parameters carry the names of that checkpoint. B batch, L image tokens, T text
tokens, D width, H query heads, G key/value heads, K head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NextDiT(nn.Module):
    """The velocity network; `forward` takes and returns what `lumina.NextDiT.forward` does."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        D, A, volume = config.dim, config.cond_dim, config.patch_volume
        self.x_embedder = nn.Linear(volume * config.in_channels, D)
        self.t_embedder = TimestepEmbedder(A)
        self.cap_embedder = nn.Sequential(
            nn.LayerNorm(config.cap_feat_dim), nn.Linear(config.cap_feat_dim, A)
        )
        self.pad_token = nn.Parameter(torch.zeros(D))  # for padded batches; images run alone here
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(D, A, volume * config.out_channels)

    def forward(
        self, x, t, cap_feats, cap_mask, *, pooled_feats=None, pooled_mask=None, rope_scaling=None,
        base_seqlen=None, context_drop=None,
    ):  # fmt: skip
        pooled = self.pooled(cap_feats, cap_mask if cap_mask.ndim == 2 else cap_mask.any(1))
        if pooled_feats is not None:
            pooled = self.pooled(pooled_feats, pooled_mask).expand_as(pooled)
        options = rope_scaling, base_seqlen, context_drop
        if not isinstance(x, list):
            return self.velocity(x, t, cap_feats, cap_mask, pooled, *options)
        # Images of several sizes: each on its own.
        area = math.prod(self.config.patch)
        lengths = [xi[0].numel() // area for xi in x]
        args = zip(x, t, cap_feats, cap_mask, pooled, lengths, strict=True)
        return [
            self.velocity(
                xi[None], ti[None], f[None], m[None] if m.ndim == 1 else m[None, :n], p[None],
                *options,
            )[0]
            for xi, ti, f, m, p, n in args
        ]  # fmt: skip

    def pooled(self, feats, mask):
        """What the mean of a caption's features (B, T, Y) adds to the conditioning vector."""
        mask = mask[:, :, None].to(feats.dtype)
        return self.cap_embedder((feats * mask).sum(1) / mask.sum(1).clamp(min=1))

    def velocity(self, x, t, cap_feats, cap_mask, pooled, rope_scaling, base_seqlen, context_drop):
        shape = x.shape
        if x.ndim == 3:
            x = x[:, :, None, None, :]  # audio: one frame, one row
        elif x.ndim == 4:
            x = x[:, :, None]  # image: one frame
        (_, ph, pw), (B, C, T, Hp, Wp) = self.config.patch, x.shape
        grid = (T, Hp // ph, Wp // pw)

        x = x.reshape(B, C, T, grid[1], ph, grid[2], pw).permute(0, 2, 3, 5, 1, 4, 6)
        x = self.x_embedder(x.reshape(B, -1, C * ph * pw))  # (B, L, D); a patch is (C, pH, pW)

        c = F.silu(self.t_embedder(t.to(x.dtype)) + pooled)  # (B, A)

        rotation = rotations(self.config, grid, rope_scaling, t)  # (B or 1, L, 1, K/2)
        scale = self.config.head_dim**-0.5
        if base_seqlen is not None:  # proportional attention
            scale *= math.sqrt(math.log(x.shape[1]) / math.log(base_seqlen))
        pooling = [None] * len(self.layers)
        if context_drop is not None:
            averages = window_averages(grid, context_drop.factor, context_drop.log_count, x.device)
            pooling = [averages if pooled else None for pooled in context_drop.layers]
        for layer, pool in zip(self.layers, pooling, strict=True):
            x = layer(x, c, cap_feats, cap_mask, rotation, scale, pool)
        x = self.final_layer(x, c)

        x = x.reshape(B, *grid, ph, pw, self.config.out_channels)  # a patch is (pH, pW, C)
        x = x.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, self.config.out_channels, T, Hp, Wp)
        return x[:, :C].reshape(shape)  # learn_sigma: the second half is unused


class TransformerBlock(nn.Module):
    """x + tanh(gate) * norm2(layer(norm1(x) * (1 + scale))), for attention, then for the FFN."""

    def __init__(self, config):
        super().__init__()
        D, eps = config.dim, config.norm_eps
        self.attention = Attention(config)
        self.feed_forward = FeedForward(D, config.ffn_dim)
        self.attention_norm1, self.attention_norm2 = RMSNorm(D, eps), RMSNorm(D, eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(D, eps), RMSNorm(D, eps)
        self.attention_y_norm = RMSNorm(config.cap_feat_dim, eps)
        # SiLU is in c already.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(config.cond_dim, 4 * D))

    def forward(self, x, c, y, y_mask, rotation, scale, pool):
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 4 D)
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        h = self.attention_norm1(x) * (1 + scale_msa)
        h = self.attention(h, self.attention_y_norm(y), y_mask, rotation, scale, pool)
        x = x + gate_msa.tanh() * self.attention_norm2(h)
        h = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))
        return x + gate_mlp.tanh() * self.ffn_norm2(h)


class Attention(nn.Module):
    """Self-attention of the image plus tanh(gate) times attention of the same q to the text."""

    def __init__(self, config):
        super().__init__()
        D, K, Y = config.dim, config.head_dim, config.cap_feat_dim
        kv = config.n_kv_heads * K
        self.head_dim = K
        self.wq, self.wo = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.wk, self.wv = nn.Linear(D, kv, bias=False), nn.Linear(D, kv, bias=False)
        self.wk_y, self.wv_y = nn.Linear(Y, kv, bias=False), nn.Linear(Y, kv, bias=False)
        # Each norm runs across all heads at once.
        eps = config.norm_eps
        norm = (lambda width: nn.LayerNorm(width, eps)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm, self.ky_norm = norm(D), norm(kv), norm(kv)
        self.gate = nn.Parameter(torch.zeros(config.n_heads))

    def forward(self, x, y, y_mask, rotation, scale, pool):
        heads = lambda z: z.unflatten(-1, (-1, self.head_dim))  # noqa: E731  (B, L, heads, K)
        q = rotate(heads(self.q_norm(self.wq(x))), rotation)
        k = rotate(heads(self.k_norm(self.wk(x))), rotation)
        v, bias = heads(self.wv(x)), None
        if pool is not None:  # context drop
            averages, bias = pool
            k, v = (torch.einsum("ml,blhk->bmhk", averages.to(z.dtype), z) for z in (k, v))
        image = attend(q, k, v, scale, bias=bias)
        text_k, text_v = heads(self.ky_norm(self.wk_y(y))), heads(self.wv_y(y))  # not rotated
        text = attend(q, text_k, text_v, self.head_dim**-0.5, y_mask)
        return self.wo((image + self.gate.tanh()[:, None] * text).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask=None, bias=None) -> Tensor:
    """softmax(q k^T scale + bias) v; each kv head serves H / G query heads, no valid key gives 0.

    key_mask (B, keys) or (B, L, keys) and bias (keys,), either may be None.
    """
    k, v = (z.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for z in (k, v))
    scores = torch.einsum("blhk,bmhk->bhlm", q, k) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_mask is not None:
        key_mask = key_mask[:, None, None] if key_mask.ndim == 2 else key_mask[:, None]
        scores = scores.masked_fill(~key_mask, -1e30)
    weights = scores.softmax(dim=-1)
    if key_mask is not None:
        weights = weights * key_mask
    return torch.einsum("bhlm,bmhk->blhk", weights, v)


def window_averages(grid, factor: int, log_count: bool, device) -> tuple[Tensor, Tensor | None]:
    """Means over factor x factor tokens of each frame as a matrix (L', L); the bias of its rows."""
    t, h, w = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    window = torch.stack([t, h // factor, w // factor], dim=-1).flatten(0, 2)  # (L, 3)
    every, counts = window.unique(dim=0, return_counts=True)
    member = (every[:, None] == window).all(-1)  # (L', L)
    return member.double() / counts[:, None], counts.double().log() if log_count else None


def rotations(config, grid: tuple[int, int, int], scaling, t: Tensor) -> Tensor:
    """exp(i angle), (B or 1, L, 1, K/2), the rotation of each pair of channels.

    Pair j is rotated by its position on axis j mod n times theta^(-2 n (j div n) / K).
    """
    n, K, theta = len(config.axes), config.head_dim, config.rope_theta
    pair = torch.arange(K // 2, device=t.device)
    exponent = (2 * n * (pair // n)).double()[None] / K
    freqs = theta**-exponent
    if scaling is not None and scaling.kind != "none":
        s = scaling.factor
        if s is None:
            side = math.sqrt(grid[1] * grid[2]) if "h" in config.axes else grid[2]
            s = max(1.0, side / scaling.base_size)
        linear, ntk = freqs / s, (theta * s) ** -exponent
        if scaling.kind == "linear":
            freqs = linear
        elif scaling.kind == "ntk":
            freqs = ntk
        elif scaling.kind == "watershed":
            freqs = torch.where((t < scaling.watershed)[:, None], linear, ntk)
        elif scaling.kind == "frequency_aware":
            d_target = K * math.log(scaling.base_size / (2 * math.pi), theta)
            freqs = torch.maximum((theta * s ** (K / d_target)) ** -exponent, linear)
        elif scaling.kind == "time_aware":
            d_t = (K - 1) * t.double()[:, None] + 1
            freqs = torch.maximum((theta * s ** (K / d_t)) ** -exponent, linear)
        else:
            raise ValueError(f"unknown RoPE scaling {scaling.kind!r}")
    coordinates = torch.meshgrid(*(torch.arange(g, device=t.device) for g in grid), indexing="ij")
    coordinates = dict(zip("thw", (z.flatten() for z in coordinates), strict=True))
    position = torch.stack([coordinates[config.axes[j % n]] for j in range(K // 2)], dim=-1)
    angles = position * freqs[:, None]  # (L, K/2) * (B or 1, 1, K/2)
    return torch.polar(torch.ones_like(angles), angles)[:, :, None]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Channels (2j, 2j+1) of (B, L, heads, K) as one complex number, times the rotation."""
    acc = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(acc).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation.to(pairs.dtype)).flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        return (z * self.weight).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """MLP of 256 sinusoids of t, which is used as it is, in [0, 1]; cosines first."""

    def __init__(self, width, hidden=None):
        super().__init__()
        hidden = hidden or width
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, t):
        z = t.to(torch.promote_types(t.dtype, torch.float32))[:, None]
        z = z * torch.exp(-math.log(10000) * torch.arange(128, device=t.device).to(z.dtype) / 128)
        return self.mlp(torch.cat([z.cos(), z.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    def __init__(self, dim, cond_dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        # SiLU is in c already.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(cond_dim, dim))

    def forward(self, x, c):
        scale = self.adaLN_modulation(c)[:, None]
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale))
