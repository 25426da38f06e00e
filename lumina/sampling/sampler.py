"""From noise to pictures: integrates a Next-DiT's guided velocity over t = 0..1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lumina.models.next_dit.model import Caption, NextDiT
from lumina.models.parts.rope import RopeScaling
from lumina.sampling.context_drop import ContextDrop
from lumina.sampling.schedules import parse_schedule, start_at
from lumina.sampling.solvers import solve
from lumina_kernels import guided_step

Size = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Result of `sample`.

    Args:
        latents: (B, C, *size), or a list of (C, *size_i) where sizes were a list; float32, float64
            from a float64 model.
        nfe: evaluations of the velocity; with guidance each is one call of the network on 2B
            images.
    """

    latents: Tensor | list[Tensor]
    nfe: int


@torch.inference_mode()
def sample(
    model: NextDiT,
    cap_feats: Tensor,
    cap_mask: Tensor,
    neg_feats: Tensor | None = None,
    neg_mask: Tensor | None = None,
    *,
    size: Size | Sequence[Size],
    steps: int = 10,
    solver: str = "midpoint",
    schedule: str | Callable[[int], Tensor] = "rational:4",
    guidance: float = 4.0,
    guidance_channels: int | None = None,
    guidance_until: float = 1.0,
    guidance_renorm: float | None = None,
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

    Classifier-free guidance (arXiv 2207.12598) follows v_u + guidance * (v_c - v_u), with c the
    caption and u the negative one.

    Args:
        model: the velocity network.
        cap_feats, cap_mask: captions, (B, T, cap_feat_dim) and (B, T) bool.
        neg_feats, neg_mask: what guidance leads away from, as a rule the encoded empty caption:
            (1 or B, T', cap_feat_dim) and (1 or B, T'). Needed unless guidance is 1.
        size: of a latent without batch and channels: (H, W), or (T, H, W), or (L,) for audio; a
            list of B of them samples pictures of different sizes in one batch.
        steps: intervals of the time grid; see `lumina.solvers.SOLVERS` for the evaluations in each.
        solver: "euler", "midpoint", "heun", "rk4", "ab2", "dopri5".
        schedule: "uniform", "rational:SHIFT", "sigmoid[:MU,ALPHA,BETA]", or a function from steps
            to a grid.
        guidance: weight; 1 runs the conditional network alone, at half the cost.
        guidance_channels: guide only so many channels and leave the rest to the caption; 3 is what
            the released Lumina-Next models (of 4 latent channels) do. None: all.
        guidance_until: guide while t is below this, then use the caption alone (Lumina-Image 2.0's
            CFG truncation). 1: guide always.
        guidance_renorm: shrink the guided velocity of a picture where its L2 norm exceeds this
            times that of the conditional one (Lumina-Image 2.0's CFG renormalisation, rho = 1
            there). None: not.
        rope_scaling, base_seqlen: as for `NextDiT.forward`.
        context_drop: in which layers, at the time of each evaluation, attention sees averages of
            its keys and values. None: in none.
        generator: of the noise; a list of B makes every picture independent of its batch. The
            noise is drawn on the generator's device, so a CPU generator gives the same on every
            device.
        latents: the noise itself, instead of drawing it.
        image: start from these data latents (image-to-image), noised to t = 1 - strength.
        strength: share of the time axis that is run from `image`; 1 ignores it.
        rtol, atol: of dopri5.
        callback: called as callback(i, t, latents) after every step.
        progress: show a bar.

    Raises:
        ValueError: arguments that do not fit each other or the model.
        TypeError: latents or image are not floating.
    """
    B = len(cap_feats)
    sizes, ragged = _sizes(size, B)
    guided = guidance != 1 and guidance_until > 0
    _check(model, guidance, guidance_channels, guidance_until, guidance_renorm, strength, image)
    if guided and (neg_feats is None or neg_mask is None):
        raise ValueError("guidance needs neg_feats and neg_mask, got None; guidance=1 does without")

    dtype, device = model.x_embedder.weight.dtype, model.x_embedder.weight.device
    conditional = caption = model.encode_caption(cap_feats.to(device, dtype), cap_mask.to(device))
    if guided:
        negative = model.encode_caption(neg_feats.to(device, dtype), neg_mask.to(device))
        caption = _stack(conditional, negative)

    grid = (parse_schedule(schedule) if isinstance(schedule, str) else schedule)(steps)
    shapes = [(model.config.in_channels, *s) for s in sizes]
    x = _noise(shapes, ragged, generator, latents, dtype, device)
    if image is not None:
        grid = start_at(grid, strength)
        x = _noised(image, x, float(grid[0]), shapes)

    def network(t: float, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Velocities for the captions and, where they are guided at t, for the negative ones."""
        # Heun, rk4 and dopri5 look at t = 1 too: not to guide there would cost them their order.
        double = guided and (t < guidance_until or guidance_until >= 1)
        batch = [xi.to(dtype) for xi in x] if ragged else x.to(dtype)
        if double:
            batch = batch + batch if ragged else torch.cat([batch, batch])
        # Never in 16 bits, which would merge neighbouring times.
        acc = torch.promote_types(dtype, torch.float32)
        time = torch.full((2 * B if double else B,), t, dtype=acc, device=device)
        return model.velocity(
            batch, time, caption if double else conditional, rope_scaling=rope_scaling,
            base_seqlen=base_seqlen,
            context_drop=context_drop and context_drop.at(t, model.config.n_layers),
        )  # fmt: skip

    def velocity(t: float, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        v = network(t, x)
        if len(v) == B:
            return v
        pairs = zip(v[:B], v[B:], strict=True)
        v = [_guide(c, u, guidance, guidance_channels, guidance_renorm) for c, u in pairs]
        return v if ragged else torch.stack(v)

    def guided_euler(t: float, dt: float, x: Tensor) -> Tensor:
        v = network(t, x)
        if len(v) == B:
            return x + dt * v
        return guided_step(x, v, guidance, dt, guidance_channels, backend=model.backend)

    # Guidance and the update in one pass, where nothing else needs the guided velocity.
    fused = solver == "euler" and guided and guidance_renorm is None and not ragged

    total = None if solver == "dopri5" else len(grid) - 1
    with tqdm(total=total, unit="step", disable=not progress) as bar:

        def after_step(i: int, t: float, x: Tensor | list[Tensor]) -> None:
            bar.update()
            if callback is not None:
                callback(i, t, x)

        x, nfe = solve(
            velocity, x, grid, solver, rtol=rtol, atol=atol, callback=after_step,
            euler_step=guided_euler if fused else None,
        )  # fmt: skip
    return Sample(x, nfe)


def _check(model, guidance, channels, until, renorm, strength, image) -> None:
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if math.isnan(until):
        raise ValueError(f"guidance_until must be a time, got {until}")
    if channels is not None and not 1 <= channels <= model.config.in_channels:
        raise ValueError(
            f"guidance_channels must lie in [1, {model.config.in_channels}], got {channels}"
        )
    if renorm is not None and not renorm > 0:
        raise ValueError(f"guidance_renorm must be positive, got {renorm}")
    if image is None and strength != 1:
        raise ValueError(f"strength {strength} needs an image to start from")


def _sizes(size, B: int) -> tuple[list[Size], bool]:
    """The size of each picture, and whether they came as a list."""
    if all(isinstance(n, int) for n in size):
        return [tuple(size)] * B, False
    if not all(isinstance(s, Sequence) and all(isinstance(n, int) for n in s) for s in size):
        raise ValueError(f"size must be whole numbers, or a list of such sizes, got {size}")
    sizes = [tuple(s) for s in size]
    if len(sizes) != B:
        raise ValueError(f"size must be one size or {B}, one for each caption, got {len(sizes)}")
    return sizes, True


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


def _noise(shapes, ragged, generator, latents, dtype, device) -> Tensor | list[Tensor]:
    """The state at t = 0, in at least float32."""
    acc = torch.promote_types(dtype, torch.float32)
    if latents is None:
        each = [generator] * len(shapes) if not isinstance(generator, Sequence) else generator
        if len(each) != len(shapes):
            raise ValueError(f"there must be 1 or {len(shapes)} generators, got {len(each)}")
        latents = [
            torch.randn(shape, generator=g, device=g.device if g is not None else None)
            for shape, g in zip(shapes, each, strict=True)
        ]
    return _batch("latents", latents, shapes, ragged, acc, device)


def _batch(name, images, shapes, ragged, dtype, device) -> Tensor | list[Tensor]:
    got = [tuple(z.shape) for z in images]
    if got != [tuple(s) for s in shapes]:
        raise ValueError(f"{name} must have the shapes {shapes}, got {got}")
    for z in images:
        if not z.is_floating_point():  # bytes 0..255 are no data
            raise TypeError(f"{name} must be floating, got {z.dtype}")
    images = [z.to(device, dtype) for z in images]
    return images if ragged else torch.stack(images)


def _noised(image, noise, t: float, shapes) -> Tensor | list[Tensor]:
    """t image + (1 - t) noise."""
    if isinstance(noise, Tensor):
        image = _batch("image", image, shapes, False, noise.dtype, noise.device)
        return t * image + (1 - t) * noise
    image = _batch("image", image, shapes, True, noise[0].dtype, noise[0].device)
    return [t * a + (1 - t) * b for a, b in zip(image, noise, strict=True)]


def _guide(
    v_c: Tensor, v_u: Tensor, weight: float, channels: int | None, renorm: float | None
) -> Tensor:
    """Guided velocity of one picture (C, ...)."""
    acc = torch.promote_types(v_c.dtype, torch.float32)
    v_c, v_u = v_c.to(acc), v_u.to(acc)
    v = v_u + weight * (v_c - v_u)
    if channels is not None:
        v = torch.cat([v[:channels], v_c[channels:]])
    if renorm is not None:
        limit = renorm * v_c.norm()
        v = v * (limit / v.norm().clamp(min=torch.finfo(acc).tiny)).clamp(max=1)
    return v
