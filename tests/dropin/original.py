"""Next-DiT as its authors' code computes it, in few lines: complex tables, one module for the
attentions to the image and to the text."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


def modulate(x, scale):
    return x * (1 + scale.unsqueeze(1))


def axis_table(positions, dim, theta=10000.0):
    angles = positions[:, None] * theta ** -(torch.arange(0, dim, 4)[: dim // 4].float() / dim)
    return torch.polar(torch.ones_like(angles), angles)


def grid_table(h, w, head_dim):
    """(h w, head_dim / 2): rows and columns take turns."""
    rows, columns = (axis_table(torch.arange(float(n)), head_dim) for n in (h, w))
    rows = rows[:, None, :].expand(h, w, -1)
    return torch.stack((rows, columns[None].expand(h, w, -1)), -1).flatten(2).flatten(0, 1)


def rotate(x, table):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[None, :, None]).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads, text_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        kv_dim = kv_heads * self.head_dim
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_dim, bias=False)
        self.wv = nn.Linear(dim, kv_dim, bias=False)
        self.wk_y = nn.Linear(text_dim, kv_dim, bias=False)
        self.wv_y = nn.Linear(text_dim, kv_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Parameter(torch.zeros(heads))
        self.q_norm = nn.LayerNorm(dim)
        self.k_norm = nn.LayerNorm(kv_dim)
        self.ky_norm = nn.LayerNorm(kv_dim)

    def attend(self, q, k, v, mask):
        """(B, H, L, K), with the keys and values repeated for the queries that share them."""
        B, L, _, K = k.shape
        n = self.heads // self.kv_heads
        k, v = (x.unsqueeze(3).repeat(1, 1, 1, n, 1).flatten(2, 3) for x in (k, v))
        mask = mask.bool().view(B, 1, 1, -1).expand(-1, self.heads, q.shape[1], -1)
        q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).permute(0, 2, 1, 3)

    def forward(self, x, x_mask, table, y, y_mask):
        B, L, _ = x.shape
        dtype = x.dtype
        q, k = self.q_norm(self.wq(x)), self.k_norm(self.wk(x))
        q = rotate(q.view(B, L, self.heads, self.head_dim), table).to(dtype)
        k = rotate(k.view(B, L, self.kv_heads, self.head_dim), table).to(dtype)
        v = self.wv(x).view(B, L, self.kv_heads, self.head_dim)
        out = self.attend(q, k, v, x_mask)
        yk = self.ky_norm(self.wk_y(y)).view(B, -1, self.kv_heads, self.head_dim)
        yv = self.wv_y(y).view(B, -1, self.kv_heads, self.head_dim)
        out_y = self.attend(q, yk, yv, y_mask)
        out = out + out_y * self.gate.tanh().view(1, 1, -1, 1)
        return self.wo(out.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, text_dim):
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads, text_dim)
        self.feed_forward = FeedForward(dim, dim)
        self.attention_norm1, self.attention_norm2 = RMSNorm(dim), RMSNorm(dim)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attention_y_norm = RMSNorm(text_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))

    def forward(self, x, x_mask, table, y, y_mask, c):
        scale_a, gate_a, scale_m, gate_m = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + gate_a.unsqueeze(1).tanh() * self.attention_norm2(
            self.attention(
                modulate(self.attention_norm1(x), scale_a),
                x_mask, table, self.attention_y_norm(y), y_mask,
            )
        )  # fmt: skip
        return x + gate_m.unsqueeze(1).tanh() * self.ffn_norm2(
            self.feed_forward(modulate(self.ffn_norm1(x), scale_m))
        )


class NextDiT(nn.Module):
    """x (B, C, H, W), t (B,), text (B, T, Y) with text_mask (B, T) to (B, C, H, W)."""

    def __init__(self, channels, dim, layers, heads, kv_heads, text_dim):
        super().__init__()
        self.head_dim = dim // heads
        self.x_embedder = nn.Linear(4 * channels, dim)
        self.t_embedder = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cap_embedder = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim))
        self.layers = nn.ModuleList(Block(dim, heads, kv_heads, text_dim) for _ in range(layers))
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_final = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim))
        self.final = nn.Linear(dim, 4 * channels)

    def forward(self, x, t, text, text_mask):
        B, C, H, W = x.shape
        angles = t[:, None].float() * 10000.0 ** -(torch.arange(128, device=x.device) / 128)
        c = self.t_embedder(torch.cat((angles.cos(), angles.sin()), -1).to(x.dtype))
        weight = text_mask.float().unsqueeze(-1)
        pooled = (text * weight).sum(1) / weight.sum(1)
        c = c + self.cap_embedder(pooled.to(text))
        x = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self.x_embedder(x)
        mask = torch.ones(x.shape[:2], dtype=torch.int32, device=x.device)
        table = grid_table(H // 2, W // 2, self.head_dim).to(x.device)
        for layer in self.layers:
            x = layer(x, mask, table, text, text_mask, c)
        x = self.final(modulate(self.norm_final(x), self.adaLN_final(c)))
        return x.view(B, H // 2, W // 2, 2, 2, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
