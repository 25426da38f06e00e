"""From noise to pictures: integrates a Next-DiT's guided velocity over t = 0..1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.next_dit.model import Caption, NextDiT
from lumina.models.parts.rope import RopeScaling
from lumina.sampling.context_drop import ContextDrop
from lumina.sampling.guidance import Guidance
from lumina.sampling.schedules import parse_schedule, start_at
from lumina.sampling.solvers import check_solver, solve
from lumina_kernels import guided_step

Size = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Result of `sample`.

    Args:
        latents: (B, C, *size), or a list of (C, *size_i) where sizes were a list; float32, float64
            from a float64 model.
        nfe: evaluations of the velocity; with guidance each is one call of the network on 2B
            images. With dopri5 the sum over the pictures, each of which is a batch of its own.
    """

    latents: Tensor | list[Tensor]
    nfe: int


@torch.no_grad()  # inference mode would spoil the parameters that FSDP gathers during the call
def sample(
    model: nn.Module,
    cap_feats: Tensor,
    cap_mask: Tensor | None = None,
    neg_feats: Tensor | None = None,
    neg_mask: Tensor | None = None,
    *,
    size: int | Size | Sequence[Size],
    steps: int = 10,
    solver: str = "midpoint",
    schedule: str | Callable[[int], Tensor] = "rational:4",
    guidance: float | Guidance = 4.0,
    rope_scaling: RopeScaling | None = None,
    base_seqlen: int | None = None,
    context_drop: ContextDrop | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | list[Tensor] | None = None,
    image: Tensor | list[Tensor] | None = None,
    strength: float = 1.0,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    callback: Callable | None = None,
    progress: bool = False,
) -> Sample:
    """Draw one picture for each caption.

    Args:
        model: a `NextDiT`, or whatever runs one when it is called: `torch.compile(model)`, a
            wrapper for distributed use or for adapters, a network with hooks.
        cap_feats, cap_mask: captions, (B, T, cap_feat_dim) and (B, T) bool; None: all of it is
            text.
        neg_feats, neg_mask: what guidance leads away from, usually the encoded empty caption:
            (1 or B, T', cap_feat_dim) and (1 or B, T'). Needed unless guidance is 1.
        size: of a latent without batch and channels: (H, W), or (T, H, W), or (L,) for audio, or
            a number for all sides; a list of B of them samples pictures of different sizes in one
            batch.
        steps: intervals of the time grid; `lumina.sampling.solvers.SOLVERS` has the evaluations of
            each.
        solver: "euler", "midpoint", "heun", "rk4", "ab2", "dopri5". The last chooses its steps for
            each picture, and so draws one after the other.
        schedule: "uniform", "rational:SHIFT", "sigmoid[:MU,ALPHA,BETA]", or a function from steps
            to a grid.
        guidance: `Guidance`, or its scale.
        rope_scaling, base_seqlen: as for `NextDiT.forward`.
        context_drop: which layers, at the time of each evaluation, see averages of keys and values.
            None: no layer.
        generator: of the noise; a list of B makes every picture independent of its batch. The
            noise is drawn on the generator's device, so a CPU generator gives the same on every
            device.
        latents: the noise itself, instead of drawing it.
        image: start from these data latents (image-to-image), noised to t = 1 - strength.
        strength: share of the time axis that is run from `image`; 1 ignores it.
        rtol, atol: of dopri5.
        callback: called as callback(i, t, latents) after every step; with dopri5 for a batch of
            one picture, i from 0 again for the next one.
        progress: show a bar.

    Raises:
        ValueError: arguments that do not fit each other or the model.
        TypeError: features, latents or image are not floating.
    """
    network = _network(model)
    config, dtype = network.config, network.dtype
    for name, feats in (("cap_feats", cap_feats), ("neg_feats", neg_feats)):
        if not isinstance(feats, Tensor) and (feats is not None or name == "cap_feats"):
            raise TypeError(f"{name} must be a tensor of features, got {type(feats).__name__}")
    B = len(cap_feats)
    sizes, common = _sizes(size, B, config)
    ragged = common is None
    # Offloaded parameters have no device; the hooks that load them move the inputs as well.
    device = network.device if network.device.type != "meta" else cap_feats.device
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    _check(guidance, config.in_channels, strength, image)
    if guidance.needed and neg_feats is None:
        raise ValueError("guidance needs neg_feats, got None; guidance=1 does without")
    grid = (parse_schedule(schedule) if isinstance(schedule, str) else schedule)(steps)
    shapes = [(config.in_channels, *s) for s in sizes]
    acc = torch.promote_types(dtype, torch.float32)
    x = _noise(shapes, generator) if latents is None else latents
    x = _batch("latents", x, shapes, ragged, acc, device)
    if image is not None:
        grid = start_at(grid, strength)
        x = _noised(_batch("image", image, shapes, ragged, acc, device), x, float(grid[0]))
    check_solver(solver, grid, rtol, atol)

    def prepared(name: str, feats: Tensor, mask: Tensor | None) -> Caption:
        if not feats.is_floating_point():
            raise TypeError(f"{name}_feats must be floating, got {feats.dtype}")
        mask = feats.new_ones(feats.shape[:2], dtype=torch.bool) if mask is None else mask
        return model(cap_feats=feats.to(device, dtype), cap_mask=mask.to(device))

    # Memory of its own: a CUDA graph overwrites what it returned when it runs again.
    conditional = both = _each(prepared("cap", cap_feats, cap_mask), torch.clone)
    if guidance.needed:
        both = _stack(conditional, prepared("neg", neg_feats, neg_mask))
    if B == 0:
        shape = (0, config.in_channels, *(common or ()))
        return Sample([] if ragged else torch.empty(shape, dtype=acc, device=device), 0)
    options = {"rope_scaling": rope_scaling, "base_seqlen": base_seqlen}
    flow = _Flow(model, network, conditional, both, guidance, context_drop, options)
    # An adaptive solver would choose steps that suit all pictures: none may depend on its batch.
    apart = solver == "dopri5" and B > 1
    flows = [flow.alone(i) for i in range(B)] if apart else [flow]
    starts = [x[i : i + 1] for i in range(B)] if apart else [x]

    # Guidance and the update in one pass, where nothing else needs the guided velocity.
    fused = solver == "euler" and guidance.needed and guidance.renorm is None and not ragged

    total = None if solver == "dopri5" else len(grid) - 1
    with tqdm(total=total, unit="step", disable=not progress) as bar:

        def after_step(i: int, t: float, x: Tensor | list[Tensor]) -> None:
            bar.update()
            if callback is not None:
                callback(i, t, x)

        runs = [
            solve(
                each.velocity, start, grid, solver, rtol=rtol, atol=atol, callback=after_step,
                euler_step=each.guided_euler if fused else None,
            )
            for each, start in zip(flows, starts, strict=True)
        ]  # fmt: skip
    ends = [end for end, _ in runs]
    return Sample(
        [z for end in ends for z in end] if ragged else torch.cat(ends), sum(nfe for _, nfe in runs)
    )


@dataclass(frozen=True)
class _Flow:
    """The velocity of some pictures, guided by their captions."""

    model: nn.Module
    network: NextDiT
    conditional: Caption
    both: Caption  # the captions and then, if guidance needs them, the negative ones
    guidance: Guidance
    context_drop: ContextDrop | None
    options: dict

    def alone(self, i: int) -> _Flow:
        """That of picture i."""
        B = len(self.conditional.mask)
        return replace(
            self,
            conditional=_each(self.conditional, lambda z: z[i::B]),
            both=_each(self.both, lambda z: z[i::B]),
        )

    def evaluate(self, t: float, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Velocities for the captions and, where they are guided at t, for the negative ones."""
        double, dtype = self.guidance.acts_at(t), self.network.dtype
        if isinstance(x, Tensor):
            batch = x.to(dtype)
            batch = torch.cat([batch, batch]) if double else batch
        else:
            batch = [xi.to(dtype) for xi in x] * (2 if double else 1)
        # Never in 16 bits, which would merge neighbouring times.
        acc = torch.promote_types(dtype, torch.float32)
        time = torch.full((len(batch),), t, dtype=acc, device=x[0].device)
        drop = self.context_drop and self.context_drop.at(t, self.network.config.n_layers)
        caption = self.both if double else self.conditional
        return self.model(batch, time, caption, context_drop=drop, **self.options)

    def velocity(self, t: float, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        v, B = self.evaluate(t, x), len(x)
        if len(v) == B:
            return v
        v = [self.guidance.velocity(c, u) for c, u in zip(v[:B], v[B:], strict=True)]
        return torch.stack(v) if isinstance(x, Tensor) else v

    def guided_euler(self, t: float, dt: float, x: Tensor) -> Tensor:
        """x + dt * velocity(t, x), fused."""
        v = self.evaluate(t, x)
        if len(v) == len(x):
            return x + dt * v
        scale, channels = self.guidance.scale, self.guidance.channels
        return guided_step(x, v, scale, dt, channels, backend=self.network.backend)


def _network(model: nn.Module) -> NextDiT:
    """The network itself, within torch.compile, DDP, FSDP, PEFT or no wrapper."""
    for module in model.modules():
        if isinstance(module, NextDiT):
            return module
    raise ValueError(f"model must be a NextDiT or contain one, got {type(model).__name__}")


def _check(guidance: Guidance, channels: int, strength: float, image) -> None:
    if guidance.channels is not None and guidance.channels > channels:
        raise ValueError(f"guidance channels must lie in [1, {channels}], got {guidance.channels}")
    if image is None and strength != 1:
        raise ValueError(f"strength {strength} needs an image to start from")


def _sizes(size, B: int, config: NextDiTConfig) -> tuple[list[Size], Size | None]:
    """The size of each picture, and that of all unless they came as a list."""
    common = (size,) * len(config.axes) if _is_whole(size) else size
    try:
        if not len(common) or not all(map(_is_whole, common)):
            common, sizes = None, [tuple(map(index, s)) for s in size]
        else:
            common = tuple(map(index, common))
            sizes = [common] * B
    except TypeError:
        raise ValueError(
            f"size must be a whole number, a tuple of them, or a list of such tuples, got {size}"
        ) from None
    if len(sizes) != B:
        raise ValueError(f"size must be one size or {B}, one for each caption, got {len(sizes)}")
    for sides in {*sizes, *([common] if common else [])}:
        if not all(0 < n < 2**31 for n in sides) or any(n % config.patch_size for n in sides[-2:]):
            raise ValueError(
                f"sides of size must be positive multiples of the patch, {config.patch_size}, "
                f"got {size}"
            )
    return sizes, common


def _is_whole(n) -> bool:
    """Whether n is an integer of Python, NumPy or PyTorch; True and False are none here."""
    try:
        index(n)
    except TypeError:
        return False
    return not isinstance(n, bool)


def _each(caption: Caption, change: Callable[[Tensor], Tensor]) -> Caption:
    """A caption with every tensor changed."""
    return Caption(
        change(caption.pooled),
        [change(z) for z in caption.keys],
        [change(z) for z in caption.values],
        change(caption.mask),
    )


def _stack(conditional: Caption, negative: Caption) -> Caption:
    """Both as one batch of 2B; the shorter text is padded, a single negative caption serves all."""
    B, T = conditional.mask.shape
    if len(negative.mask) not in (1, B):
        raise ValueError(f"there must be 1 or {B} negative captions, got {len(negative.mask)}")
    length = max(T, negative.mask.shape[1])

    def join(a: Tensor, b: Tensor) -> Tensor:  # (B, T, ...)
        b = b.expand(B, *b.shape[1:])
        pad = [(0, 0) * (z.ndim - 2) + (0, length - z.shape[1]) for z in (a, b)]
        return torch.cat([F.pad(a, pad[0]), F.pad(b, pad[1])])

    return replace(
        conditional,
        pooled=torch.cat([conditional.pooled, negative.pooled.expand(B, -1)]),
        keys=[join(a, b) for a, b in zip(conditional.keys, negative.keys, strict=True)],
        values=[join(a, b) for a, b in zip(conditional.values, negative.values, strict=True)],
        mask=join(conditional.mask, negative.mask),
    )


def _noise(shapes, generator) -> list[Tensor]:
    each = [generator] * len(shapes) if not isinstance(generator, Sequence) else generator
    if len(each) != len(shapes):
        raise ValueError(f"there must be 1 or {len(shapes)} generators, got {len(each)}")
    return [
        torch.randn(shape, generator=g, device=g.device if g is not None else None)
        for shape, g in zip(shapes, each, strict=True)
    ]


def _batch(name, images, shapes, ragged, dtype, device) -> Tensor | list[Tensor]:
    got = [tuple(z.shape) for z in images]
    if got != [tuple(s) for s in shapes]:
        raise ValueError(f"{name} must have the shapes {shapes}, got {got}")
    for z in images:
        if not z.is_floating_point():  # bytes 0..255 are not latents
            raise TypeError(f"{name} must be floating, got {z.dtype}")
    images = [z.to(device, dtype) for z in images]
    return images if ragged or not images else torch.stack(images)


def _noised(image, noise, t: float) -> Tensor | list[Tensor]:
    """t image + (1 - t) noise."""
    if isinstance(noise, Tensor):
        return t * image + (1 - t) * noise
    return [t * a + (1 - t) * b for a, b in zip(image, noise, strict=True)]
