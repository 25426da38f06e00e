"""One block of Next-DiT: self-attention with its text branch, then the feed-forward layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.parts import norms
from lumina.models.parts.geometry import Geometry
from lumina.models.parts.sandwich import SandwichBlock
from lumina.models.parts.windows import Windows, pool, pool_padded
from lumina_kernels import gqa_attention, qk_norm_rope3d, qk_norm_rope3d_pool, rope3d


class TransformerBlock(SandwichBlock):
    """`SandwichBlock` whose attention has a text branch."""

    def __init__(self, config: NextDiTConfig, backend: str | None):
        D, eps = config.dim, config.norm_eps
        super().__init__(D, config.ffn_dim, eps, Attention(config, backend), backend)
        self.attention_y_norm = norms.RMSNorm(config.cap_feat_dim, eps)
        # Scale and gate of attention, scale and gate of the FFN. The network applies the SiLU once.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(config.cond_dim, 4 * D))

    def forward(
        self,
        text: Tensor | tuple[Tensor, Tensor],
        text_mask: Tensor | None = None,
        h: Tensor | None = None,
        out: Tensor | None = None,
        weight: Tensor | None = None,
        gate: Tensor | None = None,
        c: Tensor | None = None,
        geometry: Geometry | None = None,
        windows: Windows | None = None,
    ) -> norms.Carry | tuple[Tensor, Tensor]:
        """Return the carry after this block; without h, the keys and values of the text.

        Args:
            text: features (B, T, Y), or the keys and values (B, T, G, K) that this block made of
                them.
            text_mask: (B, T) or (B, L, T) bool.
            h, out, weight, gate: the carry of the block before, (h, None, None, None) at first.
            c: SiLU of the conditioning vector, (B, A).
            geometry: where the tokens are.
            windows: over which self-attention averages keys and values, or None.
        """
        if isinstance(text, Tensor):
            text = norms.modulate(self.attention_y_norm, text, None, self.backend)
        if h is None:
            return self.attention(text)
        return self.sandwich(
            (h, out, weight, gate),
            self.adaLN_modulation(c),
            lambda pre: self.attention(text, text_mask, pre, geometry, windows),
        )


class Attention(nn.Module):
    """Self-attention of the image plus tanh(gate) times attention of the same q to the text."""

    def __init__(self, config: NextDiTConfig, backend: str | None):
        super().__init__()
        D, K, eps = config.dim, config.head_dim, config.norm_eps
        kv, Y = config.n_kv_heads * K, config.cap_feat_dim
        self.head_dim, self.backend = K, backend
        self.wq, self.wk, self.wv = (nn.Linear(D, n, bias=False) for n in (D, kv, kv))
        self.wk_y, self.wv_y = (nn.Linear(Y, kv, bias=False) for _ in range(2))
        self.wo = nn.Linear(D, D, bias=False)
        # LayerNorm across all heads, before the heads are split.
        norm = (lambda width: norms.LayerNorm(width, eps)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm, self.ky_norm = norm(D), norm(kv), norm(kv)
        self.gate = nn.Parameter(torch.zeros(config.n_heads))

    def forward(
        self,
        text: Tensor | tuple[Tensor, Tensor],
        text_mask: Tensor | None = None,
        x: Tensor | None = None,
        geometry: Geometry | None = None,
        windows: Windows | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, L, D) for x of this shape; without x, the keys and values of the text.

        text: normed features (B, T, Y), or the keys and values (B, T, G, K) made of them here.
        """
        if isinstance(text, Tensor):  # RoPE does not rotate these keys
            k = norms.modulate(self.ky_norm, self.wk_y(text), None, self.backend)
            text = self._heads(k), self._heads(self.wv_y(text))
        if x is None:
            return text
        backend, rope, key_mask = self.backend, geometry.rope, geometry.key_mask
        q, k, v = self.wq(x), self.wk(x), self._heads(self.wv(x))
        fused, bias = self._fused_norms(), None
        if fused is None:
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        q, k = self._heads(q), self._heads(k)
        parallel = geometry.parallel
        if parallel is None and fused is not None and windows is not None and windows.index is None:
            q, k, v, _, counts = qk_norm_rope3d_pool(
                q, k, v, *fused, *rope, windows.grid, windows.factor, eps=self.q_norm.eps,
                backend=backend,
            )  # fmt: skip
            bias = windows.bias(counts, k.dtype)
        else:
            if fused is not None:
                q, k = qk_norm_rope3d(q, k, *fused, *rope, self.q_norm.eps, backend=backend)
            else:
                q, k = rope3d(q, k, *rope, backend=backend)
            if parallel is None and windows is not None:
                k, v, key_mask, bias = pool(k, v, windows, backend)
        k = geometry.scaled(k)
        text = dict(text_k=text[0], text_v=text[1], text_mask=text_mask, text_gate=self.gate)
        if parallel is None:
            out = gqa_attention(q, k, v, key_mask, **text, bias=bias, backend=backend)
        else:
            means = windows and partial(pool_padded, windows=windows, backend=backend)
            out = parallel.attention(q, k, v, key_mask, **text, pool=means, backend=backend)
        return self.wo(out.flatten(2))

    def _heads(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (-1, self.head_dim))

    def _fused_norms(self) -> tuple | None:
        """Weight and bias of q_norm and of k_norm, or None where one of them has to be called."""
        q, k = norms.parameters(self.q_norm), norms.parameters(self.k_norm)
        if q is None or k is None or self.q_norm.eps != self.k_norm.eps:
            return None
        return (*q, *k)
