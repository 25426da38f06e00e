"""From noise to pictures: integrates a network's guided velocity over t = 0..1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lumina.models.next_dit.model import NextDiT
from lumina.models.parts.rope import RopeScaling
from lumina.sampling.context_drop import ContextDrop
from lumina.sampling.flow import Captions, Flow, network_of
from lumina.sampling.guidance import Guidance
from lumina.sampling.latents import Size, batched, batched_mask, drawn, kept, noised, picture_sizes
from lumina.sampling.schedules import parse_schedule, start_at
from lumina.sampling.solvers import check_solver, solve

CHANGES = {"latents", "cap_feats", "cap_mask", "neg_feats", "neg_mask"}  # by a callback


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
    pooled_feats: Tensor | None = None,
    pooled_mask: Tensor | None = None,
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
    mask: Tensor | list[Tensor] | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    callback: Callable | None = None,
    progress: bool = False,
) -> Sample:
    """Draw one picture for each caption.

    Args:
        model: a network of `lumina`, or whatever runs one when it is called:
            `torch.compile(model)`, a wrapper for distributed use or for adapters, a network with
            hooks.
        cap_feats, cap_mask: captions, (B, T, cap_feat_dim) and (B, T) bool; None: all of it is
            text. A NextDiT also takes the text that each token of the image sees, (B, L, T);
            `lumina.place_captions` makes it from boxes.
        neg_feats, neg_mask: what guidance leads away from, usually the encoded empty caption:
            (1 or B, T', cap_feat_dim) and (1 or B, T'). Needed unless guidance is 1.
        pooled_feats, pooled_mask: of a NextDiT, the caption whose mean conditions the blocks in
            place of both captions' own: (1 or B, T'', cap_feat_dim) and (1 or B, T'').
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
        strength: share of the time axis that is run from `image`; 1 starts from the noise.
        mask: inpainting: 1 (or True) where the image is drawn anew, 0 where it stays; (1 or B,
            1 or C, *size), or a list of B of (1 or C, *size_i). After every step to a time t the
            latents become mask * latents + (1 - mask) * (t * image + (1 - t) * noise), so values
            between 0 and 1 pull towards `image` in every step.
        rtol, atol: of dopri5.
        callback: called as callback(i, t, latents) after every step; with dopri5 for a batch of
            one picture, i from 0 again for the next one. It returns None, or a dict of what the
            next step shall start from: `latents`, of the same shape, and `cap_feats`, `cap_mask`,
            `neg_feats`, `neg_mask`, of as many captions. It must not write to the latents.
        progress: show a bar.

    Raises:
        ValueError: arguments that do not fit each other or the model.
        TypeError: features, latents or image are not floating; a callback returns another thing
            than None or a dict.
    """
    network = network_of(model)
    config = network.config
    if pooled_feats is not None and not isinstance(network, NextDiT):
        raise ValueError(f"pooled_feats are for a NextDiT, got a {type(network).__name__}")
    captions = Captions(cap_feats, cap_mask, neg_feats, neg_mask, pooled_feats, pooled_mask)
    B = len(cap_feats)
    sizes, common = picture_sizes(size, B, config)
    ragged = common is None
    # Offloaded parameters have no device; the hooks that load them move the inputs as well.
    device = network.device if network.device.type != "meta" else cap_feats.device
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    _check(guidance, config.in_channels, strength, image, mask)
    grid = (parse_schedule(schedule) if isinstance(schedule, str) else schedule)(steps)
    shapes = [(config.in_channels, *s) for s in sizes]
    acc = torch.promote_types(network.dtype, torch.float32)
    noise = drawn(shapes, generator) if latents is None else latents
    x = noise = batched("latents", noise, shapes, ragged, acc, device)
    if image is not None:
        image = batched("image", image, shapes, ragged, acc, device)
        grid = start_at(grid, strength)
        x = noised(image, noise, float(grid[0]))
    if mask is not None:
        mask = batched_mask(mask, shapes, ragged, acc, device)
    check_solver(solver, grid, rtol, atol)

    options = {"rope_scaling": rope_scaling, "base_seqlen": base_seqlen}
    # An adaptive solver would choose steps that suit all pictures: none may depend on its batch.
    parts = [slice(i, i + 1) for i in range(B)] if solver == "dopri5" and B > 1 else [slice(B)]
    runs = [
        (Flow(model, captions.part(part), guidance, context_drop, options), part) for part in parts
    ]
    if B == 0:
        shape = (0, config.in_channels, *(common or ()))
        return Sample([] if ragged else torch.empty(shape, dtype=acc, device=device), 0)
    # Guidance and the update in one pass, where nothing else needs the guided velocity.
    fused = solver == "euler" and guidance.needed and guidance.linear and not ragged

    ends, nfe = [], 0
    total = None if solver == "dopri5" else len(grid) - 1
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        for flow, part in runs:

            def hold(t: float, x, part: slice = part):
                return kept(x, noised(image[part], noise[part], t), mask[part])

            def after_step(i: int, t: float, x, flow: Flow = flow):
                bar.update()
                changes = None if callback is None else callback(i, t, x)
                if changes is None:
                    return None
                changes = _checked(changes)
                x = changes.pop("latents", x)
                if changes:
                    flow.replace_captions(changes)
                return x

            end, calls = solve(
                flow.velocity, x[part], grid, solver, rtol=rtol, atol=atol, callback=after_step,
                euler_step=flow.guided_euler if fused else None,
                project=None if mask is None else hold,
            )  # fmt: skip
            ends.append(end)
            nfe += calls
    return Sample([z for end in ends for z in end] if ragged else torch.cat(ends), nfe)


def _checked(changes) -> dict:
    """What a callback returned, if it may."""
    if not isinstance(changes, Mapping):
        raise TypeError(f"callback must return None or a dict, got {type(changes).__name__}")
    if unknown := changes.keys() - CHANGES:
        known = ", ".join(sorted(CHANGES))
        raise ValueError(f"callback may return {known}, got {sorted(unknown)}")
    return dict(changes)


def _check(guidance: Guidance, channels: int, strength: float, image, mask) -> None:
    if guidance.channels is not None and guidance.channels > channels:
        raise ValueError(f"guidance channels must lie in [1, {channels}], got {guidance.channels}")
    if image is None and strength != 1:
        raise ValueError(f"strength {strength} needs an image to start from")
    if image is None and mask is not None:
        raise ValueError("mask needs an image, which it leaves as it is where it is 0")
