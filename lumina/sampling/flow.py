"""The velocity of a batch of pictures, guided by their captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from lumina.models.families import NETWORKS
from lumina.sampling.context_drop import ContextDrop
from lumina.sampling.guidance import Guidance
from lumina_kernels import guided_step


def network_of(model: nn.Module) -> nn.Module:
    """The network itself, within torch.compile, DDP, FSDP, PEFT or no wrapper."""
    for module in model.modules():
        if isinstance(module, NETWORKS):
            return module
    names = " or ".join(network.__name__ for network in NETWORKS)
    raise ValueError(f"model must be a {names} or contain one, got {type(model).__name__}")


@dataclass(frozen=True)
class Captions:
    """The features of a batch of captions and of what guidance leads away from.

    Args:
        cap_feats, cap_mask, neg_feats, neg_mask, pooled_feats, pooled_mask: as for `lumina.sample`.
    """

    cap_feats: Tensor
    cap_mask: Tensor | None
    neg_feats: Tensor | None
    neg_mask: Tensor | None
    pooled_feats: Tensor | None = None
    pooled_mask: Tensor | None = None

    def __post_init__(self):
        for name in ("cap_feats", "neg_feats", "pooled_feats"):
            feats = getattr(self, name)
            if feats is None and name != "cap_feats":
                continue
            if not isinstance(feats, Tensor):
                got = type(feats).__name__
                raise TypeError(f"{name} must be a tensor of features, got {got}")
            if not feats.is_floating_point():
                raise TypeError(f"{name} must be floating, got {feats.dtype}")
        for kind, name in (("negative", "neg_feats"), ("pooled", "pooled_feats")):
            B, feats = len(self.cap_feats), getattr(self, name)
            if feats is not None and len(feats) not in (1, B):
                raise ValueError(f"there must be 1 or {B} {kind} captions, got {len(feats)}")

    def part(self, pictures: slice) -> Captions:
        """Those of some pictures; what there is one of serves all."""
        each = {field.name: getattr(self, field.name) for field in fields(self)}
        B = len(self.cap_feats)
        return Captions(**{
            name: z if z is None or len(z) != B else z[pictures] for name, z in each.items()
        })  # fmt: skip


class Flow:
    """The velocity of some pictures, guided by their captions."""

    def __init__(
        self,
        model: nn.Module,
        captions: Captions,
        guidance: Guidance,
        context_drop: ContextDrop | None,
        options: dict,
    ):
        self.model, self.network = model, network_of(model)
        self.guidance, self.context_drop, self.options = guidance, context_drop, options
        self._read(captions)

    def replace_captions(self, changes: dict[str, Tensor | None]) -> None:
        """Other features from now on, of as many captions."""
        captions, B = replace(self.captions, **changes), len(self.captions.cap_feats)
        if len(captions.cap_feats) != B:
            raise ValueError(f"there must be {B} captions still, got {len(captions.cap_feats)}")
        self._read(captions)

    def _read(self, captions: Captions) -> None:
        if self.guidance.needed and captions.neg_feats is None:
            raise ValueError("guidance needs neg_feats, got None; guidance=1 does without")
        self.captions = captions
        # Memory of its own: a CUDA graph overwrites what it returned when it runs again.
        cloned = _map(torch.clone, self._prepared("cap"))
        self.conditional = self.guided = cloned
        if not self.guidance.needed:
            return
        negative, parallel = self._prepared("neg"), self.network.guidance_parallel
        if parallel is None:
            self.guided = _stack(cloned, negative)
        elif parallel.negative:
            B = len(captions.cap_feats)
            self.guided = _map(lambda z: z.expand(B, *z.shape[1:]).clone(), negative)

    def _prepared(self, kind: str):
        # Offloaded parameters have no device; the hooks that load them move the inputs as well.
        device = self.network.device
        device = device if device.type != "meta" else self.captions.cap_feats.device

        def given(kind: str) -> tuple[Tensor, Tensor]:
            feats, mask = (getattr(self.captions, f"{kind}_{part}") for part in ("feats", "mask"))
            mask = feats.new_ones(feats.shape[:2], dtype=torch.bool) if mask is None else mask
            return feats.to(device, self.network.dtype), mask.to(device)

        feats, mask = given(kind)
        pooled = {}
        if self.captions.pooled_feats is not None:
            pooled = dict(zip(("pooled_feats", "pooled_mask"), given("pooled"), strict=True))
            if len(feats) == 1:  # one negative caption, and what conditions each picture
                feats, mask = (
                    z.expand(len(self.captions.cap_feats), *z.shape[1:]) for z in (feats, mask)
                )
        return self.model(cap_feats=feats, cap_mask=mask, **pooled)

    def evaluate(self, t: float, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Velocities for the captions and, where they are guided at t, for the negative ones."""
        double, dtype = self.guidance.acts_at(t), self.network.dtype
        batch = x.to(dtype) if isinstance(x, Tensor) else [xi.to(dtype) for xi in x]
        # Never in 16 bits, which would merge neighbouring times.
        acc = torch.promote_types(dtype, torch.float32)
        time = torch.full((len(batch),), t, dtype=acc, device=x[0].device)
        drop = self.context_drop and self.context_drop.at(t, self.network.config.n_layers)
        caption = self.guided if double else self.conditional
        parallel = self.network.guidance_parallel if double else None
        v = self.model(batch, time, caption, context_drop=drop, **self.options)
        return v if parallel is None else parallel.both(v)

    def velocity(self, t: float, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """The guided velocity."""
        v, B = self.evaluate(t, x), len(x)
        if len(v) == B:
            return v
        v = [self.guidance.velocity(c, u) for c, u in zip(v[:B], v[B:], strict=True)]
        return torch.stack(v) if isinstance(x, Tensor) else v

    def guided_euler(self, t: float, dt: float, x: Tensor) -> Tensor:
        """x + dt * velocity(t, x), fused."""
        v = self.evaluate(t, x)
        if len(v) == len(x):
            return torch.add(x, v.to(x.dtype), alpha=dt)
        scale, channels = self.guidance.scale, self.guidance.channels
        return guided_step(x, v, scale, dt, channels, backend=self.network.backend)


def _map(change: Callable, *captions):
    """A prepared caption of any family, its tensors made of those of the given ones."""
    changed = {}
    for field in fields(captions[0]):
        each = [getattr(caption, field.name) for caption in captions]
        several = isinstance(each[0], list)
        changed[field.name] = list(map(change, *each)) if several else change(*each)
    return replace(captions[0], **changed)


def _stack(conditional, negative):
    """Both as one batch of 2B; the shorter text is padded, a single negative caption serves all."""
    B, tokens = len(conditional.mask), max(conditional.mask.ndim, negative.mask.ndim) == 3
    if tokens:  # what has no mask for each token of the image is seen by all
        L = next(c.mask.shape[1] for c in (conditional, negative) if c.mask.ndim == 3)
        conditional, negative = (
            c if c.mask.ndim == 3 else replace(c, mask=c.mask[:, None].expand(-1, L, -1))
            for c in (conditional, negative)
        )
    length = max(conditional.mask.shape[-1], negative.mask.shape[-1])

    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b.expand(B, *b.shape[1:])])

    return _map(join, conditional.padded(length), negative.padded(length))
