"""Lumina-Next: Gemma, Next-DiT, and the VAE of Stable Diffusion XL."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lumina.models.parts.rope import RopeScaling
from lumina.pipelines.call import Options, Size, check_scale
from lumina.pipelines.pipeline import Pipeline
from lumina.pipelines.text import Text, clean, same_length
from lumina.sampling.guidance import Guidance


class LuminaPipeline(Pipeline):
    """Text to image with Lumina-Next, called as `diffusers.LuminaPipeline`."""

    network = "NextDiT"
    shift = 4.0
    _callback_tensor_inputs = ("latents", "prompt_embeds")

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
        clean_caption: bool = False,
        max_sequence_length: int = 256,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Features and mask of prompts, features and mask of negative prompts.

        (B, T, Y) and (B, T), the text first; B counts the pictures of each prompt one after the
        other. Embeddings that are given are returned with the others' length.
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
        return self._encoded(call, do_classifier_free_guidance, device, clean_caption=clean_caption)

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
        clean_caption: bool = True,
        max_sequence_length: int = 256,
        scaling_watershed: float | None = 1.0,
        proportional_attn: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
        **ours,
    ):
        """Draw pictures for prompts.

        Args:
            prompt, negative_prompt: one or several; the negative ones are empty by default.
            width, height: in pixels, multiples of 16; a list has one for each prompt. By default
                the size of the released model.
            num_inference_steps, sigmas: of the scheduler's time grid.
            guidance_scale: above 1; of the first three channels, as the models were released.
            num_images_per_prompt: pictures of a prompt, one after the other.
            generator: of the noise, or one for each picture.
            latents: the noise itself.
            prompt_embeds, negative_prompt_embeds and their masks: instead of prompts.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: an `ImagePipelineOutput` instead of a tuple.
            clean_caption: drop markup and addresses from the prompt. Lower case it is in any case.
            max_sequence_length: tokens of a prompt; the rest is cut, with a warning.
            scaling_watershed: time up to which positions are interpolated to the size of training,
                also from smaller pictures; RoPE's base changes from there on. None: neither. If
                any of several sizes is smaller, pictures of different areas are run apart.
            proportional_attn: attention grows sharper with the number of tokens.
            callback_on_step_end: called as callback(pipe, i, timestep, tensors) after a step;
                returns None, or a dict of those tensors that are to be replaced. Pictures that run
                apart (with dopri5 each) are seen one run after the other, i from 0 again. Once
                `pipe._interrupt` is set, every run ends after its step.
            callback_on_step_end_tensor_inputs: "latents", "prompt_embeds" (with guidance those of
                the negative prompts come after the others).
            ours: the fields of `lumina.pipelines.call.Options`.

        Raises:
            TypeError, ValueError: an argument of another kind, or that does not fit.
            FloatingPointError: the network or the VAE overflows.
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
            sigmas=sigmas,
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
        base = self.default_image_size // 16
        parts = [prompt for _, prompt in ours.regions]
        return self._draw(
            call,
            ours,
            scale=scale,
            guidance=(lambda grid: self.guidance_by(scale)) if scale > 1 else None,
            texts=lambda guided: self._texts(call, guided, parts, clean_caption=clean_caption),
            rope_scaling=lambda pixels: self._rope_scaling(scaling_watershed, pixels),
            base_seqlen=base**2 if proportional_attn else None,
        )

    def guidance_by(self, scale: float, **bounds) -> Guidance:
        """Of the first three channels, as the models were released."""
        return Guidance(scale, channels=3, **bounds)

    def _rope_scaling(
        self, watershed: float | None, pixels: list[Size]
    ) -> list[RopeScaling | None]:
        """For each picture, by its own size; one for all where the network finds out itself."""
        if watershed is None:
            return [None] * len(pixels)
        factors = [math.sqrt(h * w) / self.default_image_size for h, w in pixels]
        if len(set(factors)) > 1 and min(factors) >= 1:
            scaling = RopeScaling("watershed", base_size=self.base_size, watershed=watershed)
            return [scaling] * len(pixels)
        return [
            None if factor == 1 else RopeScaling("watershed", factor, watershed=watershed)
            for factor in factors
        ]

    def _words(self, prompts: list[str], clean_caption: bool) -> list[str]:
        return [(clean(p) if clean_caption else p).lower().strip() for p in prompts]

    # A callback sees the features of all that the network gets in one batch.

    def _embeddings(self, text: Text, negative: Text | None) -> dict:
        if negative is None:
            return {"prompt_embeds": text.feats}
        return {"prompt_embeds": torch.cat([t.feats for t in same_length(text, negative)])}

    def _replaced(self, given: dict, text: Text, negative: Text | None) -> dict[str, Text]:
        if negative is None:
            return super()._replaced(given, text, None)
        text, negative = same_length(text, negative)
        both = Text(torch.cat([text.feats, negative.feats]), torch.cat([text.mask, negative.mask]))
        feats = super()._replaced(given, both, None)["text"].feats
        parts = zip(feats.chunk(2), both.mask.chunk(2), strict=True)
        return dict(zip(("text", "negative"), (Text(*part) for part in parts), strict=True))
