"""Next-DiT (Lumina-Next, arXiv 2406.18583) on the fused ops of lumina_kernels.

The parameters have the names of the released checkpoint and of `lumina.reference.NextDiT`, which
defines in plain PyTorch what this file computes. B batch, L image tokens, T text tokens, D width,
A conditioning width, H query heads, G key/value heads, K head_dim, Y width of the text features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.models.next_dit.block import Attention, TransformerBlock
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.parts import norms
from lumina.models.parts.captions import captions_of_each, check_features
from lumina.models.parts.final_layer import FinalLayer
from lumina.models.parts.geometry import Geometry, key_scale
from lumina.models.parts.patches import Tokens, filled, repeated, to_images, to_tokens
from lumina.models.parts.rope import RopeScaling, rope_axes, rope_frequencies
from lumina.models.parts.timestep import TimestepEmbedder
from lumina.models.parts.windows import DroppedLayers, windows_of_layers

if TYPE_CHECKING:
    from lumina.distributed.guidance import GuidanceParallel
    from lumina.distributed.sequence import SequenceParallel


@dataclass(frozen=True)
class Caption:
    """What the network makes of a batch of captions; `NextDiT.encode_caption` returns it.

    It depends on neither x nor t, so one serves a whole sampling run.
    """

    pooled: Tensor  # (B, A)
    keys: list[Tensor]  # per layer (B, T, G, K), normed
    values: list[Tensor]  # per layer (B, T, G, K)
    mask: Tensor  # (B, T) or (B, L, T) bool

    def padded(self, length: int) -> Caption:
        """With `length` text tokens, the new ones masked."""
        more = length - self.mask.shape[-1]
        keys, values = (
            [F.pad(z, (0, 0, 0, 0, 0, more)) for z in x] for x in (self.keys, self.values)
        )
        return Caption(self.pooled, keys, values, F.pad(self.mask, (0, more)))


class NextDiT(nn.Module):
    """The velocity network of Lumina-Next.

    Args:
        config: sizes, see `NextDiTConfig`.
        backend: of every op: "torch", "triton", "cuda", "cpu"; None takes the best one for the
            tensors' device.

    Attributes:
        sequence_parallel: the processes that share the tokens of every image. All call the network
            with the same arguments, and all get the whole result; docs/distributed.md has more.
            None: this one has all tokens.
        guidance_parallel: the two processes that share guidance in `lumina.sample`; None: this one
            runs the captions and the negative ones.
    """

    sequence_parallel: SequenceParallel | None = None
    guidance_parallel: GuidanceParallel | None = None

    def __init__(self, config: NextDiTConfig, backend: str | None = None) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        D, A, volume = config.dim, config.cond_dim, config.patch_volume
        self.x_embedder = nn.Linear(volume * config.in_channels, D)
        self.t_embedder = TimestepEmbedder(A)
        self.cap_embedder = nn.Sequential(
            nn.LayerNorm(config.cap_feat_dim), nn.Linear(config.cap_feat_dim, A)
        )
        # Stored, but without influence: attention masks padding, and the output drops it.
        self.pad_token = nn.Parameter(torch.empty(D))
        self.layers = nn.ModuleList(
            TransformerBlock(config, backend) for _ in range(config.n_layers)
        )
        self.final_layer = FinalLayer(D, A, volume * config.out_channels, backend)
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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations.

        Taken from a parameter that quantisation and layerwise casting leave alone.
        """
        return self.pad_token.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters; "meta" while they are offloaded."""
        return self.pad_token.device

    def forward(
        self,
        x: Tensor | list[Tensor] | None = None,
        t: Tensor | None = None,
        cap_feats: Tensor | Caption | None = None,
        cap_mask: Tensor | None = None,
        *,
        pooled_feats: Tensor | None = None,
        pooled_mask: Tensor | None = None,
        rope_scaling: RopeScaling | None = None,
        base_seqlen: int | None = None,
        context_drop: DroppedLayers | None = None,
    ) -> Tensor | list[Tensor] | Caption:
        """Return the velocity dx/dt = data - noise at time t, where x = t * data + (1 - t) * noise.

        Without x and t, return the prepared `Caption` instead: `model(cap_feats=f, cap_mask=m)`.
        `model(x, t, caption)` then equals `model(x, t, f, m)` and spares that part of the work.

        There may be n captions for every image, of all images the first, then of all the second,
        and so on, as guidance needs them: `model(x, t, ...)` is `model(cat([x] * n), cat([t] * n),
        ...)`.

        Args:
            x: latents (B, C, H, W); (B, C, T, H, W) with axes ("t", "h", "w"); (B, C, L) with axes
                ("w",); or a list of B of them without the batch, of any sizes.
            t: (B,), 0 is noise, 1 is data; used as it is, not times 1000.
            cap_feats: text features (n B, T, cap_feat_dim), or a prepared caption.
            cap_mask: (n B, T) bool, True where there is text; any pattern, also nowhere. Or
                (n B, L, T), the text that each image token sees, in row-major order of the patches
                (regional prompts). Part of a prepared caption.
            pooled_feats, pooled_mask: (B or 1, T', cap_feat_dim) and (B or 1, T') bool, the caption
                whose mean conditions the blocks. None: the text that any token sees.
            rope_scaling: how RoPE's frequencies stretch beyond the size of training; None: not.
            base_seqlen: tokens of an image at training: turns on proportional attention, which
                multiplies the scores of self-attention by sqrt(log(tokens) / log(base_seqlen)),
                with the tokens of each image.
            context_drop: layers whose self-attention sees averages of the keys and values of
                neighbouring tokens; `lumina.ContextDrop().at(t, n_layers)` makes it from the time
                as a float, because reading the tensor `t` would stall the host. None: no layer.

        Returns:
            As x: a tensor of its dtype, n times its batch, or a list.

        Raises:
            ValueError: shapes that do not fit each other or the config.
        """
        if isinstance(cap_feats, Caption):
            pooled, mask = cap_feats.pooled, cap_feats.mask
            texts = list(zip(cap_feats.keys, cap_feats.values, strict=True))
        else:
            check_features("cap", cap_feats, cap_mask, self.config.cap_feat_dim, by_token=True)
            mask, seen = cap_mask, cap_mask if cap_mask.ndim == 2 else cap_mask.any(1)
            # A masked key has weight 0, but 0 * NaN is NaN, and an encoder's padding may hold NaN.
            cap_feats = cap_feats.masked_fill(~seen[..., None], 0)
            if pooled_feats is None:
                if pooled_mask is not None:
                    raise ValueError("pooled_mask needs pooled_feats")
                pooled = self._pooled(cap_feats, seen)
            else:
                check_features("pooled", pooled_feats, pooled_mask, self.config.cap_feat_dim)
                rest = pooled_feats.masked_fill(~pooled_mask[..., None], 0)
                pooled = self._pooled(rest, pooled_mask)
                if cap_feats.shape[0] % pooled.shape[0]:
                    raise ValueError(
                        f"pooled_feats must be of 1 or as many images as there are, "
                        f"got {pooled.shape[0]} for {cap_feats.shape[0]} captions"
                    )
                pooled = repeated(pooled, cap_feats.shape[0] // pooled.shape[0])
            texts = [cap_feats] * len(self.layers)
        if x is None and t is None:
            keys, values = zip(
                *(layer(text) for layer, text in zip(self.layers, texts, strict=True)), strict=True
            )
            return Caption(pooled, list(keys), list(values), mask)
        n = captions_of_each(x, t, mask.shape[0])
        x, t = repeated(x, n), repeated(t, n)
        tokens = to_tokens(x, self.config)
        if mask.ndim == 3 and mask.shape[1] != tokens.patches.shape[1]:
            raise ValueError(
                f"cap_mask must be (B, T) or (B, {tokens.patches.shape[1]}, T) for this image, "
                f"got {tuple(mask.shape)}"
            )
        parallel, length = self.sequence_parallel, tokens.patches.shape[1]
        if parallel is not None:
            mask = parallel.shard(mask, 1) if mask.ndim == 3 else mask
            tokens = replace(
                tokens,
                patches=parallel.shard(tokens.patches, 1),
                positions=parallel.shard(tokens.positions, -2),
                mask=parallel.key_mask(tokens.mask, tokens.patches),
            )
        h = self.x_embedder(tokens.patches)  # (B, L, D)
        c = self.t_embedder(t, tokens.patches.dtype) + pooled  # (B, A)
        if torch.is_grad_enabled():
            # The gradient of a parameter without influence is 0; DDP waits for it in every step.
            c = c + self.pad_token[:0].sum()
        c = F.silu(c)
        geometry = Geometry(
            self._rope(tokens, t, rope_scaling),
            tokens.mask,
            key_scale(tokens.grids, base_seqlen, h),
            parallel=parallel,
        )
        windows = windows_of_layers(tokens.grids, context_drop, len(self.layers), h.device)

        carry: norms.Carry = (h, None, None, None)
        for layer, text, window in zip(self.layers, texts, windows, strict=True):
            carry = layer(text, mask, *carry, c, geometry, window)
        h = norms.residual_sum(carry, self.config.norm_eps, self.backend)
        out = self.final_layer(h, c)
        if parallel is not None:
            out = parallel.gather(out, 1, length)
        return to_images(out, tokens.grids, x, self.config)

    def encode_caption(self, cap_feats: Tensor, cap_mask: Tensor) -> Caption:
        """Do, once for a sampling run, the part of `forward` that depends on the captions alone."""
        return self(cap_feats=cap_feats, cap_mask=cap_mask)

    def velocity(self, x, t, caption: Caption, **options) -> Tensor | list[Tensor]:
        """The velocity for a caption prepared by `encode_caption`; options as in `forward`."""
        return self(x, t, caption, **options)

    def _pooled(self, cap_feats: Tensor, cap_mask: Tensor) -> Tensor:
        """As the released code: the mean of the raw features in float32, and no division by 0."""
        acc = torch.promote_types(cap_feats.dtype, torch.float32)
        pooled = cap_feats.to(acc).sum(1) / cap_mask.sum(1, keepdim=True).clamp(min=1)
        return self.cap_embedder(pooled.to(cap_feats.dtype))

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
