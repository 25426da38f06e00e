"""The network around the joint blocks; each family says how it treats the time and the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.models.parts import norms
from lumina.models.parts.captions import captions_of_each, check_features
from lumina.models.parts.final_layer import FinalLayer
from lumina.models.parts.geometry import Geometry, key_scale
from lumina.models.parts.joint import JointBlock, JointCaption
from lumina.models.parts.joint_config import JointConfig
from lumina.models.parts.patches import Grid, Tokens, filled, repeated, to_images, to_tokens
from lumina.models.parts.rope import RopeScaling, block_axes, block_frequencies
from lumina.models.parts.windows import DroppedLayers, Windows, windows_of_layers

if TYPE_CHECKING:
    from lumina.distributed.guidance import GuidanceParallel
    from lumina.distributed.sequence import SequenceParallel

# Learned tokens (1, P, D) behind those of an image, and which are attended, (B, P); None: all.
Padding = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Images:
    """A batch of images on its way through the network."""

    h: Tensor  # (B, L, D), after the refiner with the padding behind
    grids: list[Grid]  # patches along (t, h, w): one for all or, where they differ, one each
    positions: Tensor  # (B, L, 3)
    mask: Tensor | None  # (B, L) bool, False beyond an image; None: no such tokens
    padding: Padding | None
    inv_freq: Tensor  # of RoPE, (K/2,) or (B, K/2)
    c: Tensor  # of the blocks, (B, A)
    final_c: Tensor  # of the final layer, (B, A)

    def repeated(self, n: int) -> Images:
        """The batch n times in a row."""
        return replace(
            self,
            h=repeated(self.h, n),
            grids=self.grids if len(self.grids) == 1 else self.grids * n,
            positions=repeated(self.positions, n),
            mask=repeated(self.mask, n),
            padding=self.padding and (self.padding[0], repeated(self.padding[1], n)),
            inv_freq=self.inv_freq if self.inv_freq.ndim == 1 else repeated(self.inv_freq, n),
            c=repeated(self.c, n),
            final_c=repeated(self.final_c, n),
        )


class JointTransformer(nn.Module):
    """A velocity network whose blocks run over image and text in one sequence.

    Before them a few blocks run over the text alone and over the image alone (the refiners).

    Attributes:
        sequence_parallel: the processes that share the tokens of every image and of the text beside
            it (not the text's refiner). All call the network with the same arguments, and all get
            the whole result; docs/distributed.md has more. None: this one has all tokens.
        guidance_parallel: the two processes that share guidance in `lumina.sample`; None: this one
            runs the captions and the negative ones.
    """

    sequence_parallel: SequenceParallel | None = None
    guidance_parallel: GuidanceParallel | None = None

    def __init__(
        self, config: JointConfig, t_embedder: nn.Module, backend: str | None = None
    ) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        D, Y, volume = config.dim, config.cap_feat_dim, config.patch_volume
        self.x_embedder = nn.Linear(volume * config.in_channels, D)
        self.t_embedder = t_embedder
        self.cap_embedder = nn.Sequential(norms.RMSNorm(Y, config.norm_eps), nn.Linear(Y, D))
        refiners = range(config.n_refiner_layers)
        self.noise_refiner = nn.ModuleList(self._block() for _ in refiners)
        self.context_refiner = nn.ModuleList(JointBlock(config, None, backend) for _ in refiners)
        self.layers = nn.ModuleList(self._block() for _ in range(config.n_layers))
        out = volume * config.out_channels
        self.final_layer = FinalLayer(D, config.cond_dim, out, backend)

    def _modulation(self) -> nn.Module:
        """What makes scales and gates (B, 4 D) out of the conditioning vector (B, A)."""
        raise NotImplementedError

    def _conditions(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the blocks and what the final layer take of the time, (B, A) each."""
        raise NotImplementedError

    def _embedded(self, feats: Tensor, mask: Tensor) -> JointCaption:
        """The text before its refiner."""
        raise NotImplementedError

    def _padding(self, tokens: Tokens) -> Padding | None:
        """What comes behind the image's tokens; None: nothing."""
        return None

    def _block(self) -> JointBlock:
        return JointBlock(self.config, self._modulation(), self.backend)

    def reset_parameters(self) -> None:
        """Every modulated block starts as the identity, and the output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(module.weight, std=0.02)
        modulated = (*self.noise_refiner, *self.layers, self.final_layer)
        for module in (self.final_layer.linear, *(m.adaLN_modulation[-1] for m in modulated)):
            nn.init.zeros_(module.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations.

        Taken from a parameter that quantisation and layerwise casting leave alone.
        """
        return self.cap_embedder[0].weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters; "meta" while they are offloaded."""
        return self.cap_embedder[0].weight.device

    def forward(
        self,
        x: Tensor | list[Tensor] | None = None,
        t: Tensor | None = None,
        cap_feats: Tensor | JointCaption | None = None,
        cap_mask: Tensor | None = None,
        *,
        rope_scaling: RopeScaling | None = None,
        base_seqlen: int | None = None,
        context_drop: DroppedLayers | None = None,
    ) -> Tensor | list[Tensor] | JointCaption:
        """Return the velocity dx/dt = data - noise at time t, where x = t * data + (1 - t) * noise.

        Without x and t, return the prepared `JointCaption`: `model(cap_feats=f, cap_mask=m)`.
        `model(x, t, caption)` then equals `model(x, t, f, m)` and spares that part of the work.

        There may be n captions for every image, of all images the first, then of all the second,
        and so on, as guidance needs them: `model(x, t, ...)` is `model(cat([x] * n), cat([t] * n),
        ...)`, and what does not depend on the caption is computed once.

        Args:
            x: latents (B, C, H, W), or a list of B of (C, H, W), of any sizes.
            t: (B,), 0 is noise, 1 is data.
            cap_feats: text features (n B, T, cap_feat_dim), or a prepared caption.
            cap_mask: (n B, T) bool, True where there is text; any pattern. What it leaves out has
                no place and no influence. Part of a prepared caption.
            rope_scaling: how RoPE's frequencies stretch beyond the size of training; None: not.
            base_seqlen: tokens of an image at training: turns on proportional attention, which
                multiplies the scores of the joint blocks by sqrt(log(tokens) / log(base_seqlen)),
                with the tokens of each image. The released models do without.
            context_drop: joint blocks whose attention sees averages of the keys and values of
                neighbouring image tokens; see `NextDiT.forward`. None: no block.

        Returns:
            As x: a tensor (n B, C, H, W) of its dtype, or a list.

        Raises:
            ValueError: shapes that do not fit each other or the config.
        """
        caption = cap_feats
        if not isinstance(caption, JointCaption):
            caption = self._caption(cap_feats, cap_mask)
        if x is None and t is None:
            return caption
        n = captions_of_each(x, t, caption.mask.shape[0])
        tokens = to_tokens(x, self.config)
        h = self.x_embedder(tokens.patches)
        frame = [rows * columns for _, rows, columns in tokens.grids]
        stretching = {"t": t, "tokens": frame[0] if len(frame) == 1 else filled(frame, t.device)}
        images = Images(
            h, tokens.grids, tokens.positions.expand(*h.shape[:2], 3), tokens.mask,
            self._padding(tokens), self._inv_freq(t.device, scaling=rope_scaling, **stretching),
            *self._conditions(t, h.dtype),
        )  # fmt: skip
        # All tokens of an image have one place on the first axis, and a rotation that queries and
        # keys share cancels: one pass of the refiner serves all captions of an image. Not beside
        # padding, whose place is another.
        shared = images.padding is None
        if shared:
            images = self._refined(images, None)
        # A processor gains nothing from larger batches, and smaller ones take less memory and less
        # padding of their text.
        eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        on_cpu = eager and h.device.type == "cpu"
        parts, out = n if on_cpu else 1, []
        for own in caption.split(parts):
            own = own.trimmed() if on_cpu else own
            some = images.repeated(n // parts)
            if not shared:
                some = self._refined(some, own.image_place)
            out.append(self._joint(some, own, base_seqlen, context_drop))
        out = out[0] if parts == 1 else torch.cat(out)
        return to_images(out, tokens.grids, x, self.config)

    def encode_caption(self, cap_feats: Tensor, cap_mask: Tensor) -> JointCaption:
        """Do, once for a sampling run, the part of `forward` that depends on the captions alone."""
        return self(cap_feats=cap_feats, cap_mask=cap_mask)

    def velocity(self, x, t, caption: JointCaption, **options) -> Tensor | list[Tensor]:
        """The velocity for a caption prepared by `encode_caption`; options as in `forward`."""
        return self(x, t, caption, **options)

    def _refined(self, images: Images, place: Tensor | None) -> Images:
        """After the blocks over the image alone, which lies at `place` (B,); with its padding."""
        h = images.h
        if images.padding is not None:
            h = torch.cat([h, images.padding[0].expand(h.shape[0], -1, -1)], 1)
        where, mask = self._positions(images, place)
        own, geometry = self._own(h, where, mask, images.inv_freq)
        own = self._run(self.noise_refiner, own, images.c, geometry)
        return replace(images, h=self._whole(own, h.shape[1]))

    def _joint(
        self,
        images: Images,
        caption: JointCaption,
        base_seqlen: int | None,
        context_drop: DroppedLayers | None,
    ) -> Tensor:
        """The patches of the velocity (B, L, ...), from the refined image and text."""
        grids, L = images.grids, images.positions.shape[1]
        where, mask = self._positions(images, caption.image_place)
        mask = torch.cat(
            [_all_true(mask, images.h.shape[:2], caption.mask.device), caption.mask], 1
        )
        where = torch.cat([where, _on_first_axis(caption.places)], 1)
        h = torch.cat([images.h, caption.text.to(images.h.dtype)], 1)
        own, geometry = self._own(h, where, mask, images.inv_freq)
        geometry = replace(geometry, key_scale=key_scale(grids, base_seqlen, h), image_tokens=L)
        windows = windows_of_layers(
            grids, context_drop, len(self.layers), h.device, among_others=True
        )
        # Ranks that share tokens have equally many in every exchange, the text's as well.
        keep = L if self.sequence_parallel is None else None
        own = self._run(self.layers, own, images.c, geometry, windows, keep)
        out = self._whole(self.final_layer(own, images.final_c), h.shape[1])
        return out if self.sequence_parallel is None else out[:, :L]

    def _own(self, h: Tensor, where: Tensor, mask: Tensor | None, inv_freq: Tensor):
        """This process's tokens of (B, L, D), all of them or its share, and their geometry."""
        parallel, own_mask = self.sequence_parallel, mask
        if parallel is not None:
            beyond = -h.shape[1] % parallel.size
            if mask is not None or beyond:
                mask = F.pad(_all_true(mask, h.shape[:2], h.device), (0, beyond))
                own_mask = parallel.shard(mask, 1)
            h, where = parallel.shard(h, 1), parallel.shard(where, 1)
        rope = self._rope(where, inv_freq)
        return h, Geometry(rope, own_mask, None, parallel=parallel, whole_mask=mask)

    def _whole(self, own: Tensor, length: int) -> Tensor:
        """What all processes have of `length` tokens, or this one's."""
        parallel = self.sequence_parallel
        return own if parallel is None else parallel.gather(own, 1, length)

    def _positions(self, images: Images, place: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, L + P, 3) of the image's tokens and its padding, and which of them are attended."""
        where, mask = images.positions, images.mask
        B, L, _ = where.shape
        if place is not None:
            where = where + _on_first_axis(place[:, None])
        if images.padding is None:
            return where, mask
        P, attended = images.padding[0].shape[1], images.padding[1]
        where = torch.cat([where, where.new_zeros(B, P, 3)], 1)
        if mask is not None or attended is not None:
            attended = _all_true(attended, (B, P), where.device)
            mask = torch.cat([_all_true(mask, (B, L), where.device), attended], 1)
        return where, mask

    def _run(
        self,
        blocks: nn.ModuleList,
        h: Tensor,
        c: Tensor | None,
        geometry: Geometry,
        windows: Sequence[Windows | None] | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """h after the blocks; only its first `keep` tokens, if that is given."""
        carry: norms.Carry = (h, None, None, None)
        windows = windows or [None] * len(blocks)
        for i, (block, window) in enumerate(zip(blocks, windows, strict=True)):
            last = keep if i + 1 == len(blocks) else None
            carry = block(*carry, c, geometry, window, last)
        return norms.residual_sum(carry, self.config.norm_eps, self.backend)

    def _caption(self, feats, mask) -> JointCaption:
        check_features("cap", feats, mask, self.config.cap_feat_dim)
        # A masked key has weight 0, but 0 * NaN is NaN, and an encoder's padding may hold NaN.
        caption = self._embedded(feats.masked_fill(~mask[..., None], 0), mask)
        rope = self._rope(_on_first_axis(caption.places), self._inv_freq(mask.device))
        geometry = Geometry(rope, caption.mask, None)
        return replace(caption, text=self._run(self.context_refiner, caption.text, None, geometry))

    def _rope(self, where: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """positions, inv_freq and axis of the rope ops."""
        return where, inv_freq, block_axes(self.config.axes_dims, device=where.device)

    def _inv_freq(self, device, **stretching) -> Tensor:
        """RoPE's frequencies; `stretching` as for `block_frequencies`."""
        acc = torch.promote_types(self.dtype, torch.float32)
        dims, theta = self.config.axes_dims, self.config.rope_theta
        return block_frequencies(dims, theta, device=device, dtype=acc, **stretching)


def _on_first_axis(places: Tensor) -> Tensor:
    """(B, T, 3) positions, with zeros on the axes of the image, for (B, T)."""
    zero = torch.zeros_like(places)
    return torch.stack([places, zero, zero], -1)


def _all_true(mask: Tensor | None, shape, device) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
