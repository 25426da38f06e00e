"""Blocks that run over image and text in one sequence: Lumina-Image 2.0, Z-Image and their kin.

B batch, L image tokens, T text tokens, D width, A conditioning width, H query heads, G key/value
heads, K head_dim. A sequence is the image's tokens and then the text's; their places are in the
positions, and attention does not care for the order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.models.parts import norms
from lumina.models.parts.geometry import Geometry
from lumina.models.parts.joint_config import JointConfig
from lumina.models.parts.sandwich import SandwichBlock
from lumina.models.parts.windows import Windows, pool
from lumina_kernels import gqa_attention, qk_norm_rope3d, rope3d


@dataclass(frozen=True)
class JointCaption:
    """What a joint network makes of a batch of captions.

    It depends on neither x nor t, so one serves a whole sampling run.
    """

    text: Tensor  # (B, T, D)
    mask: Tensor  # (B, T) bool: what is attended
    places: Tensor  # (B, T), on the first axis of RoPE
    image_place: Tensor  # (B,), that of the image

    def padded(self, length: int) -> JointCaption:
        """With `length` text tokens, the new ones masked."""
        more = length - self.mask.shape[1]
        return replace(
            self, text=F.pad(self.text, (0, 0, 0, more)), mask=F.pad(self.mask, (0, more)),
            places=F.pad(self.places, (0, more)),
        )  # fmt: skip

    def trimmed(self) -> JointCaption:
        """Without the text tokens behind the last one that any caption attends to.

        Their number is read on the host, so on a GPU this waits for the device.
        """
        used = self.mask.any(0).nonzero()
        length = int(used[-1]) + 1 if len(used) else 0
        return replace(
            self, text=self.text[:, :length], mask=self.mask[:, :length],
            places=self.places[:, :length],
        )  # fmt: skip

    def split(self, n: int) -> list[JointCaption]:
        """In n parts of as many captions."""
        if n == 1:
            return [self]
        each = (z.chunk(n) for z in (self.text, self.mask, self.places, self.image_place))
        return [JointCaption(*part) for part in zip(*each, strict=True)]


class JointBlock(SandwichBlock):
    """`SandwichBlock` over image and text.

    Args:
        config: sizes.
        modulation: makes the scales and gates (B, 4 D) out of the conditioning vector; None: the
            block has neither.
    """

    def __init__(self, config: JointConfig, modulation: nn.Module | None, backend: str | None):
        attention = JointAttention(config, backend)
        super().__init__(config.dim, config.ffn_dim, config.norm_eps, attention, backend)
        if modulation is not None:
            self.adaLN_modulation = modulation

    def forward(
        self,
        h: Tensor,
        out: Tensor | None = None,
        weight: Tensor | None = None,
        gate: Tensor | None = None,
        c: Tensor | None = None,
        geometry: Geometry | None = None,
        windows: Windows | None = None,
        keep: int | None = None,
    ) -> norms.Carry:
        """Return the carry after this block.

        Args:
            h, out, weight, gate: the carry of the block before, (h, None, None, None) at first.
            c: what the modulation takes, (B, A); None without a modulation.
            geometry: where the tokens are.
            windows: over which attention averages the keys and values of the image, or None.
            keep: how many tokens, the first ones, go on; None: all.
        """
        return self.sandwich(
            (h, out, weight, gate),
            None if c is None else self.adaLN_modulation(c),
            lambda pre: self.attention(pre, geometry, windows, keep),
            keep,
        )


class JointAttention(nn.Module):
    """softmax(q kT / sqrt(K)) v with RMSNorm on the heads of q and k, and RoPE."""

    def __init__(self, config: JointConfig, backend: str | None):
        super().__init__()
        D, K = config.dim, config.head_dim
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim, self.backend = K, backend
        self.qkv = nn.Linear(D, sum(self.heads) * K, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.q_norm, self.k_norm = norms.RMSNorm(K, 1e-5), norms.RMSNorm(K, 1e-5)

    def forward(
        self,
        x: Tensor,
        geometry: Geometry,
        windows: Windows | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """(B, L, D) for x of this shape, or (B, keep, D) for its first tokens."""
        backend, key_mask, bias = self.backend, geometry.key_mask, None
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        weights = norms.parameters(self.q_norm), norms.parameters(self.k_norm)
        eps = self.q_norm.eps
        if None in weights or self.k_norm.eps != eps:
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
            weights = None
        q, k = rotated(q, k, weights, geometry.rope, eps, backend)
        means = windows and partial(pooled, geometry=geometry, windows=windows, backend=backend)
        if geometry.parallel is not None:
            k, parallel = geometry.scaled(k), geometry.parallel
            out = parallel.attention(q, k, v, key_mask, pool=means, backend=backend)
        else:
            if means is not None:
                k, v, key_mask, bias = means(k, v)
            k = geometry.scaled(k)
            out = gqa_attention(q[:, :keep], k, v, key_mask, bias=bias, backend=backend)
        return self.out(out.flatten(2))


def rotated(q: Tensor, k: Tensor, weights, rope, eps: float, backend: str | None):
    """RoPE, after the norms of these weights (None: they are done)."""
    if weights is None:
        return rope3d(q, k, *rope, backend=backend)
    (q_weight, _), (k_weight, _) = weights
    return qk_norm_rope3d(
        q, k, q_weight, None, k_weight, None, *rope, eps, "rms_per_head", backend=backend
    )


def pooled(
    k: Tensor, v: Tensor, geometry: Geometry, windows: Windows, backend: str | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys, values, mask and bias; the image's averaged over windows, the others as they are."""
    L = geometry.image_tokens
    image_k, image_v, mask, bias = pool(k[:, :L], v[:, :L], windows, backend)
    if geometry.whole_mask is not None:
        if mask is None:
            mask = torch.ones(image_k.shape[:2], dtype=torch.bool, device=k.device)
        mask = torch.cat([mask, geometry.whole_mask[:, L:]], 1)
    if bias is not None:
        bias = F.pad(bias, (0, k.shape[1] - L))
    k, v = torch.cat([image_k, k[:, L:]], 1), torch.cat([image_v, v[:, L:]], 1)
    return k, v, mask, bias
