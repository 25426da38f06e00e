"""Lumina-Image 2.0: Gemma 2, its joint transformer, and the VAE of FLUX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.pipelines.call import Options, check_scale, lora_scale
from lumina.pipelines.pipeline import Pipeline
from lumina.sampling.guidance import Guidance

SYSTEM_PROMPT = (  # of the released model's training
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts."
)


@dataclass(frozen=True)
class RowGuidance(Guidance):
    """Guidance that gives every row of latents the norm it has for the caption alone.

    So does diffusers; the original program compares the norms of whole pictures, and only shrinks:
    `lumina.Guidance(4.0, renorm=1.0)`.
    """

    def velocity(self, v_c: Tensor, v_u: Tensor) -> Tensor:
        v = super().velocity(v_c, v_u)
        norm, was = (z.to(v.dtype).norm(dim=-1, keepdim=True) for z in (v_c, v))
        return v * (norm / was.clamp(min=torch.finfo(v.dtype).tiny))


class Lumina2Pipeline(Pipeline):
    """Text to image with Lumina-Image 2.0, called as `diffusers.Lumina2Pipeline`."""

    network = "Lumina2"
    shift = 6.0
    system_prompt = SYSTEM_PROMPT

    def encode_prompt(
        self,
        prompt: str | list[str],
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        system_prompt: str | None = None,
        max_sequence_length: int = 256,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Features and mask of prompts, features and mask of negative prompts.

        As `LuminaPipeline.encode_prompt`; of the length of the longest, not of 256 tokens.
        """
        call = self._call(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        return self._encoded(call, do_classifier_free_guidance, device, system_prompt=system_prompt)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        width: int | list[int] | None = None,
        height: int | list[int] | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        negative_prompt: str | list[str] | None = None,
        sigmas: list[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | list[Tensor] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
        system_prompt: str | None = None,
        cfg_trunc_ratio: float = 1.0,
        cfg_normalization: bool = True,
        max_sequence_length: int = 256,
        **ours,
    ):
        """Draw pictures for prompts. Parameters as `LuminaPipeline.__call__`, and these:

        Args:
            guidance_scale: above 1; of all channels.
            attention_kwargs: {"scale": s} runs adapters (LoRA) at s times their weight.
            system_prompt: comes before every prompt, not before the negative ones. None: that of
                the released model.
            cfg_trunc_ratio: share of the steps, the first ones, that are guided. All steps of the
                grid count, also those before the start from an image.
            cfg_normalization: give the guided velocity the norm of the caption's, row by row.
        """
        ours = Options.of(type(self), ours)
        call = self._call(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=self._sigmas(num_inference_steps, sigmas, ours),
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            max_sequence_length=max_sequence_length,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        scale = check_scale("guidance_scale", guidance_scale)
        ratio = check_scale("cfg_trunc_ratio", cfg_trunc_ratio)

        def guidance(grid: Tensor) -> Guidance:
            rule = self.guidance_by if cfg_normalization else Guidance
            return rule(scale, until=_until(grid, ratio))

        return self._draw(
            call,
            ours,
            scale=scale,
            guidance=guidance if scale > 1 else None,
            texts=lambda guided: self._texts(call, guided, system_prompt=system_prompt),
            lora_scale=lora_scale("attention_kwargs", attention_kwargs),
        )

    def guidance_by(self, scale: float, **bounds) -> Guidance:
        """By rows, unless a bound of the norm is given."""
        by_rows = bounds.get("renorm") is None
        return (RowGuidance if by_rows else Guidance)(scale, **bounds)

    def _words(self, prompts: list[str], system_prompt: str | None) -> list[str]:
        system = self.system_prompt if system_prompt is None else system_prompt
        return [f"{system} <Prompt Start> {prompt}" for prompt in prompts]


def _until(grid: Tensor, ratio: float) -> float:
    """The time of the first step that is not guided; 1: all are."""
    steps = len(grid) - 1
    guided = sum((i + 1) / steps <= ratio for i in range(steps))
    return 1.0 if guided == steps else float(grid[guided])
