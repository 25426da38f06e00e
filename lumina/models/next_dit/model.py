"""Next-DiT (Lumina-Next, arXiv 2406.18583) on the fused ops of lumina_kernels.

The same parameters, under the same names, as the released checkpoint and as
`lumina.reference.NextDiT`, the plain-PyTorch definition of what this file computes. B batch,
L image tokens, T text tokens, D width, A conditioning width, H query heads, G key/value heads,
K head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.parts.patches import Grid, Tokens, filled, to_images, to_tokens
from lumina.models.parts.rope import RopeScaling, rope_axes, rope_frequencies
from lumina.sampling.context_drop import DroppedLayers, Windows, pool, windows_of_layers
from lumina_kernels import (
    gqa_attention,
    norm_modulate,
    qk_norm_rope3d,
    qk_norm_rope3d_pool,
    rope3d,
    sandwich_norm,
    sandwich_norm_chain,
    swiglu,
)


@dataclass(frozen=True)
class Caption:
    """What the network needs of a batch of captions, made by `NextDiT.encode_caption`.

    Depends on neither x nor t, so one serves a whole sampling run.
    """

    pooled: Tensor  # (B, A)
    keys: list[Tensor]  # per layer (B, T, G, K), normed
    values: list[Tensor]  # per layer (B, T, G, K)
    mask: Tensor  # (B, T) bool


class NextDiT(nn.Module):
    """The velocity network of Lumina-Next.

    Args:
        config: sizes, see `NextDiTConfig`.
        backend: of every op: "torch", "triton", "cuda", "cpu"; None takes the best one for the
            tensors' device.
    """

    def __init__(self, config: NextDiTConfig, backend: str | None = None):
        super().__init__()
        self.config, self.backend = config, backend
        D, A, volume = config.dim, config.cond_dim, config.patch_volume
        self.x_embedder = nn.Linear(volume * config.in_channels, D)
        self.t_embedder = TimestepEmbedder(A)
        self.cap_embedder = nn.Sequential(
            nn.LayerNorm(config.cap_feat_dim), nn.Linear(config.cap_feat_dim, A)
        )
        # Of the checkpoint. Padding is masked in attention and cut off at the end, so it is unused.
        self.pad_token = nn.Parameter(torch.empty(D))
        self.layers = nn.ModuleList(
            TransformerBlock(config, backend) for _ in range(config.n_layers)
        )
        self.final_layer = FinalLayer(config, backend)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Lumina-Next: every block starts as the identity, and the output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, Attention):
                nn.init.zeros_(module.gate)
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(module.weight, std=0.02)
        modulations = [m.adaLN_modulation[1] for m in (*self.layers, self.final_layer)]
        for module in (self.cap_embedder[1], self.final_layer.linear, *modulations):
            nn.init.zeros_(module.weight)
        nn.init.normal_(self.pad_token, std=0.02)

    def forward(
        self,
        x: Tensor | list[Tensor],
        t: Tensor,
        cap_feats: Tensor,
        cap_mask: Tensor,
        *,
        rope_scaling: RopeScaling | None = None,
        base_seqlen: int | None = None,
        context_drop: DroppedLayers | None = None,
    ) -> Tensor | list[Tensor]:
        """Return the velocity dx/dt = data - noise at time t, where x = t * data + (1 - t) * noise.

        Args:
            x: latents (B, C, H, W); (B, C, T, H, W) with axes ("t", "h", "w"); (B, C, L) with axes
                ("w",); or a list of B of them without the batch, of any sizes.
            t: (B,), 0 is noise, 1 is data; used as it is, not times 1000.
            cap_feats: text features (B, T, cap_feat_dim).
            cap_mask: (B, T) bool, True where there is text; any pattern, also nowhere.
            rope_scaling: how RoPE's frequencies stretch beyond the size of training; None: not.
            base_seqlen: tokens of an image at training: turns on proportional attention, which
                multiplies the scores of self-attention by sqrt(log(tokens) / log(base_seqlen)),
                with the tokens of each image.
            context_drop: layers whose self-attention sees averages of the keys and values of
                neighbouring tokens; `lumina.ContextDrop().at(t, n_layers)` makes it from the time
                as a float, since to read `t` would stop the host. None: no layer.

        Returns:
            As x: a tensor of its shape and dtype, or a list.

        Raises:
            ValueError: shapes that do not fit each other or the config.
        """
        caption = self.encode_caption(cap_feats, cap_mask)
        return self.velocity(
            x, t, caption, rope_scaling=rope_scaling, base_seqlen=base_seqlen,
            context_drop=context_drop,
        )  # fmt: skip

    def encode_caption(self, cap_feats: Tensor, cap_mask: Tensor) -> Caption:
        """Do, once for a sampling run, the part of `forward` that depends on the captions alone."""
        width = self.config.cap_feat_dim
        if cap_feats.ndim != 3 or cap_feats.shape[-1] != width:
            raise ValueError(
                f"cap_feats must have shape (B, T, {width}), got {tuple(cap_feats.shape)}"
            )
        if cap_mask.shape != cap_feats.shape[:2] or cap_mask.dtype != torch.bool:
            raise ValueError(
                f"cap_mask must be bool of shape {tuple(cap_feats.shape[:2])}, "
                f"got {cap_mask.dtype} of shape {tuple(cap_mask.shape)}"
            )
        # A masked key has weight 0, but 0 * NaN is NaN, and an encoder's padding may hold NaN.
        cap_feats = cap_feats.masked_fill(~cap_mask[..., None], 0)
        # As the released code: the mean of the raw features in float32, and no division by zero.
        acc = torch.promote_types(cap_feats.dtype, torch.float32)
        pooled = cap_feats.to(acc).sum(1) / cap_mask.sum(1, keepdim=True).clamp(min=1)
        pooled = self.cap_embedder(pooled.to(cap_feats.dtype))
        keys, values = zip(*(layer.text_kv(cap_feats) for layer in self.layers), strict=True)
        return Caption(pooled, list(keys), list(values), cap_mask)

    def velocity(
        self,
        x: Tensor | list[Tensor],
        t: Tensor,
        caption: Caption,
        *,
        rope_scaling: RopeScaling | None = None,
        base_seqlen: int | None = None,
        context_drop: DroppedLayers | None = None,
    ) -> Tensor | list[Tensor]:
        """`forward` for captions that `encode_caption` has prepared."""
        B = len(x)
        if t.shape != (B,) or len(caption.mask) != B:
            raise ValueError(
                f"t must have shape ({B},) and there must be {B} captions for {B} images, "
                f"got {tuple(t.shape)} and {len(caption.mask)}"
            )
        tokens = to_tokens(x, self.config)
        h = self.x_embedder(tokens.patches)  # (B, L, D)

        c = F.silu(self.t_embedder(t) + caption.pooled)  # (B, A)
        eps, backend, layers = self.config.norm_eps, self.backend, self.layers
        modulation = [z for m in layers for z in m.adaLN_modulation(c).chunk(4, dim=-1)]
        scales, gates = modulation[0::2], modulation[1::2]  # of the pre-norms, of the post-norms
        rope = self._rope(tokens, t, rope_scaling)
        key_scale = _key_scale(tokens.grids, base_seqlen, h)
        windows = windows_of_layers(tokens.grids, context_drop, len(layers), h.device)

        pre = norm_modulate(
            h, layers[0].attention_norm1.weight, scale=scales[0], eps=eps, backend=backend
        )
        for i, layer in enumerate(layers):
            text = (caption.keys[i], caption.values[i], caption.mask)
            out = layer.attention(pre, rope, tokens.mask, key_scale, text, windows[i])
            h, pre = sandwich_norm_chain(
                out, h, layer.attention_norm2.weight, gates[2 * i],
                layer.ffn_norm1.weight, scales[2 * i + 1], eps, backend=backend,
            )  # fmt: skip
            out = layer.feed_forward(pre)
            if i + 1 < len(layers):
                h, pre = sandwich_norm_chain(
                    out, h, layer.ffn_norm2.weight, gates[2 * i + 1],
                    layers[i + 1].attention_norm1.weight, scales[2 * i + 2], eps, backend=backend,
                )  # fmt: skip
            else:
                h = sandwich_norm(
                    out, h, layer.ffn_norm2.weight, gates[2 * i + 1], eps, backend=backend
                )
        return to_images(self.final_layer(h, c), tokens, x, self.config)

    def _rope(
        self, tokens: Tokens, t: Tensor, scaling: RopeScaling | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """positions, inv_freq and axis of the rope ops."""
        K, axes = self.config.head_dim, self.config.axes
        frame = [h * w for _, h, w in tokens.grids]
        tokens_per_frame = frame[0] if len(frame) == 1 else filled(frame, t.device)
        inv_freq = rope_frequencies(
            K, axes, self.config.rope_theta, scaling=scaling, t=t, tokens=tokens_per_frame,
            device=t.device, dtype=torch.promote_types(tokens.patches.dtype, torch.float32),
        )  # fmt: skip
        return tokens.positions, inv_freq, rope_axes(K, axes, device=t.device)


class TransformerBlock(nn.Module):
    """Parameters of one block. `NextDiT.velocity` runs it: a post-norm fuses with the next norm."""

    def __init__(self, config: NextDiTConfig, backend: str | None):
        super().__init__()
        D, eps = config.dim, config.norm_eps
        self.attention = Attention(config, backend)
        self.feed_forward = FeedForward(D, config.ffn_dim, backend)
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(D, eps), nn.RMSNorm(D, eps)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(D, eps), nn.RMSNorm(D, eps)
        self.attention_y_norm = nn.RMSNorm(config.cap_feat_dim, eps)
        # Scale and gate of attention, scale and gate of the FFN. The SiLU is done once for all.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(config.cond_dim, 4 * D))

    def text_kv(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, G, K) of the text features (B, T, cap_feat_dim)."""
        attention, norm = self.attention, self.attention_y_norm
        y = norm_modulate(y, norm.weight, eps=norm.eps, backend=attention.backend)
        k, v = attention.wk_y(y), attention.wv_y(y)
        if attention.qk_norm:  # not as a module: autocast would turn only the keys into float32
            norm = attention.ky_norm
            k = norm_modulate(
                k, norm.weight, norm.bias, eps=norm.eps, kind="layer", backend=attention.backend
            )
        return k.unflatten(-1, (-1, attention.head_dim)), v.unflatten(-1, (-1, attention.head_dim))


class Attention(nn.Module):
    """Self-attention of the image plus tanh(gate) times attention of the same q to the text."""

    def __init__(self, config: NextDiTConfig, backend: str | None):
        super().__init__()
        D, K, eps = config.dim, config.head_dim, config.norm_eps
        kv, Y = config.n_kv_heads * K, config.cap_feat_dim
        self.head_dim, self.qk_norm, self.eps, self.backend = K, config.qk_norm, eps, backend
        self.wq, self.wk, self.wv = (nn.Linear(D, n, bias=False) for n in (D, kv, kv))
        self.wk_y, self.wv_y = (nn.Linear(Y, kv, bias=False) for _ in range(2))
        self.wo = nn.Linear(D, D, bias=False)
        # LayerNorm across all heads, before the heads are split.
        norm = (lambda width: nn.LayerNorm(width, eps)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm, self.ky_norm = norm(D), norm(kv), norm(kv)
        self.gate = nn.Parameter(torch.zeros(config.n_heads))

    def forward(self, x, rope, key_mask, key_scale, text, windows: Windows | None):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        norms = [p for norm in (self.q_norm, self.k_norm) for p in norm.parameters()]
        bias = None
        if self.qk_norm and windows is not None and windows.index is None:
            q, k, v, _, counts = qk_norm_rope3d_pool(
                q, k, v, *norms, *rope, windows.grid, windows.factor, eps=self.eps,
                backend=self.backend,
            )  # fmt: skip
            bias = windows.bias(counts, k.dtype)
        else:
            if self.qk_norm:
                q, k = qk_norm_rope3d(q, k, *norms, *rope, self.eps, backend=self.backend)
            else:
                q, k = rope3d(q, k, *rope, backend=self.backend)
            if windows is not None:
                k, v, key_mask, bias = pool(k, v, windows, self.backend)
        if key_scale is not None:
            k = (k * key_scale).to(k.dtype)
        text_k, text_v, text_mask = text
        out = gqa_attention(
            q, k, v, key_mask, text_k=text_k, text_v=text_v, text_mask=text_mask,
            text_gate=self.gate, bias=bias, backend=self.backend,
        )  # fmt: skip
        return self.wo(out.flatten(2))  # (B, L, D)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int, backend: str | None):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.backend = backend

    def forward(self, x):
        return self.w2(swiglu(self.w1(x), self.w3(x), backend=self.backend))


class TimestepEmbedder(nn.Module):
    """MLP of 256 sinusoids of t, cosines first."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        # bfloat16 would merge neighbouring times.
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).to(t.dtype) / 128)
        angles = t[:, None] * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """linear(layer_norm(x) * (1 + scale)); the norm has no weight, and an epsilon of its own."""

    def __init__(self, config: NextDiTConfig, backend: str | None):
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_volume * config.out_channels)
        # The SiLU is done once for all.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(config.cond_dim, config.dim))
        self.backend = backend

    def forward(self, x, c):
        scale = self.adaLN_modulation(c)
        x = norm_modulate(x, scale=scale, eps=1e-6, kind="layer", backend=self.backend)
        return self.linear(x)


def _key_scale(grids: list[Grid], base_seqlen: int | None, like: Tensor) -> Tensor | None:
    """Proportional attention's factor, one of all images or one of each, (B or 1, 1, 1, 1).

    A tensor: as a number it would be a constant of the compiled graph, one graph for every size.
    """
    if base_seqlen is None:
        return None
    if base_seqlen < 2:
        raise ValueError(f"base_seqlen must be at least 2 tokens, got {base_seqlen}")
    # Not in 16 bits: the factor would be off by up to 1/256, and for all keys alike.
    acc = torch.promote_types(like.dtype, torch.float32)
    tokens = filled([t * h * w for t, h, w in grids], like.device, acc)
    return (tokens.log() / math.log(base_seqlen)).sqrt()[:, None, None, None]
