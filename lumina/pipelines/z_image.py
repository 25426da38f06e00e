"""Z-Image: Qwen 3, its joint transformer, and the VAE of FLUX."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lumina.pipelines.call import Options, check_scale, lora_scale
from lumina.pipelines.pipeline import Pipeline
from lumina.pipelines.schedule import timesteps_of
from lumina.pipelines.text import Text
from lumina.sampling.guidance import Guidance


class ZImagePipeline(Pipeline):
    """Text to image with Z-Image, called as `diffusers.ZImagePipeline`."""

    network = "ZImage"
    shift = 3.0
    needs_chat_template = True

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: list[Tensor] | None = None,
        max_sequence_length: int = 512,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Features (T_i, Y) of each prompt, and of each negative prompt (none: an empty list)."""
        call = self._call(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        device = device or self._execution_device
        texts = self._texts(call, do_classifier_free_guidance)
        return tuple([] if text is None else text.to(device).as_list() for text in texts)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | list[int] | None = None,
        width: int | list[int] | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        cfg_normalization: bool | float = False,
        cfg_truncation: float | None = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | list[Tensor] | None = None,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
        max_sequence_length: int = 512,
        **ours,
    ):
        """Draw pictures for prompts. Parameters as `LuminaPipeline.__call__`, and these:

        Args:
            guidance_scale: g above 0 gives v_c + g (v_c - v_u), which `lumina.Guidance` calls a
                scale of 1 + g. The distilled models take 0.
            cfg_normalization: shrink the guided velocity of a picture to so many times the norm of
                the caption's, if it is larger; True: to once. False: never.
            cfg_truncation: time after which steps are not guided, by the grid as it is without an
                image; None or above 1: all are.
            prompt_embeds, negative_prompt_embeds: lists of (T_i, Y).
            joint_attention_kwargs: {"scale": s} runs adapters (LoRA) at s times their weight.
        """
        ours = Options.of(type(self), ours)
        call = self._call(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
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
        limit = cfg_normalization
        limit = float(limit) if isinstance(limit, bool) else check_scale("cfg_normalization", limit)

        def guidance(grid: Tensor) -> Guidance:
            until = _until(grid, cfg_truncation)
            return self.guidance_by(scale, until=until, renorm=limit if limit > 0 else None)

        return self._draw(
            call,
            ours,
            scale=scale,
            guidance=guidance if scale > 0 else None,
            texts=lambda guided: self._texts(call, guided),
            noise_dtype=torch.float32,
            lora_scale=lora_scale("joint_attention_kwargs", joint_attention_kwargs),
        )

    def guidance_by(self, scale: float, **bounds) -> Guidance:
        """With what comes on top of the velocity for the caption."""
        return Guidance(1 + scale, **bounds)

    def _words(self, prompts: list[str]) -> list[str]:
        return [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]

    _negative_words = _words

    def _embeddings(self, text: Text, negative: Text | None) -> dict:
        """What a callback gets to see: lists, as they were given."""
        return {
            "prompt_embeds": text.as_list(),
            "negative_prompt_embeds": [] if negative is None else negative.as_list(),
        }

    def _replaced(self, given: dict, text: Text, negative: Text | None) -> dict[str, Text]:
        kept = {"prompt_embeds": "text", "negative_prompt_embeds": "negative"}
        return {
            name: self._given(f"{key} of the callback", given[key])
            for key, name in kept.items()
            if given.get(key)
        }


def _until(grid: Tensor, truncation: float | None) -> float:
    """The time of the first step that is not guided; 1: all are."""
    if truncation is None or check_scale("cfg_truncation", truncation) > 1:
        return 1.0
    # diffusers rounds the times to float32, but compares them in double.
    times = ((1000 - timesteps_of(grid)) / 1000).tolist()
    late = [t for t, seen in zip(grid.tolist(), times, strict=False) if seen > truncation]
    return late[0] if late else 1.0
