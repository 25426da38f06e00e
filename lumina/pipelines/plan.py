"""What a call comes to: everything about it that can be wrong is found here, before any work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.pipelines import pictures
from lumina.pipelines.call import Call, Options, Size
from lumina.pipelines.parts import network_of
from lumina.pipelines.schedule import time_grid, timesteps_of
from lumina.pipelines.text import Text
from lumina.sampling.regions import place_captions
from lumina.sampling.schedules import start_at
from lumina.sampling.solvers import check_solver


@dataclass(frozen=True)
class Plan:
    """A call that has been checked.

    Args:
        pixels, sizes: (height, width) of each picture, and of its latents.
        ragged: whether the sizes came as a list, and so do the pictures.
        channels: of the latents.
        grid, ran: times from noise to data, and those of the steps that are run: from a picture,
            the last ones.
        timesteps: of the steps that are run, as diffusers counts time.
        image: (1, 3, height, width) for each picture, or None.
        mask: (1, *size) for each picture, 1 where it is drawn anew, or None.
    """

    pixels: list[Size]
    sizes: list[Size]
    ragged: bool
    channels: int
    grid: Tensor
    ran: Tensor
    timesteps: Tensor
    image: list[Tensor] | None
    mask: list[Tensor] | None


def make_plan(pipe, call: Call, ours: Options) -> Plan:
    """The plan of a call of a pipeline.

    Raises:
        TypeError, ValueError: the rule that is broken, and what came.
    """
    channels = network_of(type(pipe), pipe.transformer).config.in_channels
    call.check_callback(pipe._callback_tensor_inputs)
    factor, patch = pipe.vae_scale_factor, pipe.patch_size
    pixels, ragged = call.sizes(pipe.default_image_size, factor * patch)
    sizes = [(height // factor, width // factor) for height, width in pixels]
    tokens = None if ragged else (sizes[0][0] // patch) * (sizes[0][1] // patch)
    grid = time_grid(pipe.scheduler, call.num_inference_steps, call.sigmas, ours.schedule, tokens)
    if ours.regions:
        _check_regions(pipe, call, ours, sizes[0], ragged)
    if call.latents is not None:
        pictures.check_latents(call.latents, channels, sizes)
    if pipe.vae is None and (ours.image is not None or call.output_type != "latent"):
        raise ValueError("pictures need a vae, this pipeline has none: output_type='latent'")
    image = mask = None
    if ours.image is not None:
        if call.sigmas is not None and grid[0] != 0:
            got = call.sigmas[0]
            raise ValueError(
                f"with an image, sigmas must begin at 1, got {got}: strength is what says where "
                "to start"
            )
        image = pictures.prepare(ours.image, call.batch, pixels, pipe.image_processor, "image")
    if ours.mask_image is not None:
        mask = pictures.prepare(
            ours.mask_image, call.batch, pixels, pipe.mask_processor, "mask_image"
        )
        mask = [pictures.redrawn(each, factor) for each in mask]
    ran = grid if image is None else start_at(grid, ours.start)
    check_solver(ours.solver, ran, ours.rtol, ours.atol)
    return Plan(pixels, sizes, ragged, channels, grid, ran, timesteps_of(ran), image, mask)


def _check_regions(pipe, call: Call, ours: Options, size: Size, ragged: bool) -> None:
    if pipe.network != "NextDiT":
        raise ValueError(f"regions are for Lumina-Next, this is a {type(pipe).__name__}")
    if call.prompt is None or len(call.prompt) != 1 or ragged:
        raise ValueError("regions are of one picture: give one prompt and one size")
    if "prompt_embeds" in call.callback_on_step_end_tensor_inputs:
        raise ValueError("a callback can not change prompt_embeds of regions")
    rows = len(ours.regions) + 1
    nothing = Text(torch.zeros(rows, 1, 1), torch.ones(rows, 1, dtype=torch.bool))
    place(ours, nothing, size, pipe.patch_size)


def place(ours: Options, text: Text, size: Size, patch: int) -> tuple[Text, dict[str, Tensor]]:
    """The text that each token sees, and what the sampler gets of that of the whole picture.

    text: of each region, and of the whole at the end.
    """
    boxes = [box for box, _ in ours.regions]
    grid = (size[0] // patch, size[1] // patch)
    text_of_parts = place_captions(text.feats[:-1], text.mask[:-1], boxes, grid)
    return Text(*text_of_parts), {"pooled_feats": text.feats[-1:], "pooled_mask": text.mask[-1:]}
