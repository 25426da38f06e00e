"""What the pipelines of the three families share: the parts, a call from check to picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from lumina.models.parts.rope import RopeScaling
from lumina.pipelines import pictures
from lumina.pipelines.call import Call, Options, Size, is_count
from lumina.pipelines.denoising import denoise, like
from lumina.pipelines.loading import load, save
from lumina.pipelines.parts import check_parts, check_sample_size, halvings, network_of
from lumina.pipelines.plan import make_plan, place
from lumina.pipelines.text import Text, encode, same_length, text_of
from lumina.sampling.guidance import Guidance


class Pipeline(DiffusionPipeline):
    """Text to image; `Pipeline.from_pretrained(FOLDER)` gives that of the folder's family.

    Moving, offloading and the progress bar are `diffusers.DiffusionPipeline`'s: `to`,
    `enable_model_cpu_offload`, `enable_sequential_cpu_offload`, `set_progress_bar_config`.

    Args:
        transformer: a network of ours, or what contains one (torch.compile, adapters).
        scheduler: a `FlowMatchEulerDiscreteScheduler`, which gives the times of the steps.
        vae: an `AutoencoderKL` or `AutoencoderTiny` of diffusers; None: only latents come out.
        text_encoder: a causal language model of transformers; None: only embeddings go in.
        tokenizer: that of the text encoder.
        sample_size: of the latents where a call names no size.

    Raises:
        TypeError, ValueError: a part of another kind, or that does not fit the others.
    """

    network: str  # name of the network's class in `lumina`
    shift: float  # of time, where there is no scheduler
    needs_chat_template = False
    patch_size = 2
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self, transformer, scheduler, vae, text_encoder, tokenizer, sample_size: int = 128
    ) -> None:
        super().__init__()
        check_parts(type(self), transformer, scheduler, vae, text_encoder, tokenizer)
        check_sample_size("sample_size", sample_size, self.patch_size)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder,
            tokenizer=tokenizer,
        )  # fmt: skip
        self.register_to_config(sample_size=sample_size)
        self.vae_scale_factor = 2 ** (3 if vae is None else halvings(vae))
        self.default_sample_size = sample_size
        self.default_image_size = sample_size * self.vae_scale_factor
        grain = self.vae_scale_factor * self.patch_size
        self.image_processor = VaeImageProcessor(vae_scale_factor=grain)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=grain, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        # By stages: how each part is loaded when it is needed; it then has no memory here.
        self._loaders: dict[str, Callable[[], nn.Module]] = {}
        self._stage_device = torch.device("cpu")
        self._guidance_scale, self._guided, self._num_timesteps = 1.0, False, 0
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        dtype: torch.dtype = torch.float32,
        torch_dtype: torch.dtype | None = None,
        device_map: str | torch.device | dict | None = None,
        stages: bool = False,
        backend: str | None = None,
        ema: bool | None = None,
        **parts,
    ) -> Pipeline:
        """Load a pipeline from a folder; of `Pipeline` the class of the folder's family.

        Args:
            folder: of a pipeline as diffusers stores it; or weights that `lumina.load` reads, with
                the other parts given.
            dtype, torch_dtype: of network, text encoder and VAE; the second name is the older one.
            device_map: a device for all, or for each part, by name, a device or what transformers
                and diffusers take as their `device_map`. None: the CPU.
            stages: load a part when it is needed and free it afterwards: text encoder, network and
                VAE are never in memory together. Every call reads them again.
            backend, ema: of the network, as for `lumina.load`.
            parts: text_encoder, tokenizer, vae, scheduler, transformer: a folder or a module
                instead of the folder's. Without a tokenizer the text encoder's folder is looked
                into, without a scheduler the family's shift of time holds.

        Raises:
            FileNotFoundError: there is no such folder, or a part is missing.
            TypeError, ValueError: parts that are damaged, of another kind or do not fit.
        """
        return load(
            cls, folder, dtype=torch_dtype or dtype, device_map=device_map, stages=stages,
            backend=backend, ema=ema, given=parts,
        )  # fmt: skip

    def save_pretrained(self, folder: str | os.PathLike, **options) -> None:
        """Write a folder that we and diffusers read; options are those of the parts' own method."""
        save(self, folder, **options)

    def to(self, *args, **kwargs) -> Pipeline:
        if self._loaders:
            raise ValueError("by stages, the device and dtype are from_pretrained's to choose")
        return super().to(*args, **kwargs)

    def enable_vae_tiling(self) -> None:
        """Decode large pictures by tiles, which takes less memory; their seams are blended."""
        self.vae.enable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode the pictures of a batch one by one."""
        self.vae.enable_slicing()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guided

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to end the run with the latents of that step.

        Of pictures that run one after the other the later ones end after their first step.
        """
        return self._interrupt

    @property
    def _execution_device(self) -> torch.device:
        return self._stage_device if self._loaders else super()._execution_device

    def use_stages(self, loaders: dict[str, Callable[[], nn.Module]], device: torch.device) -> None:
        """From now on load each of these parts when it is needed, and free it afterwards."""
        self._loaders, self._stage_device = loaders, device

    @contextmanager
    def stage(self, name: str) -> Iterator[nn.Module]:
        """A part to work with; by stages it is loaded now and freed at the end."""
        if name not in self._loaders:
            yield getattr(self, name)
            return
        part = self._loaders[name]()
        if name == "vae":
            for mode in ("use_tiling", "use_slicing"):
                setattr(part, mode, getattr(self.vae, mode))
        try:
            yield part
        finally:
            part.to("meta")  # frees its memory, whoever still refers to it
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def device_of(self, part: nn.Module) -> torch.device:
        """Where the inputs of a part have to be."""
        return self._execution_device if hasattr(part, "_hf_hook") else part.device

    @property
    def base_size(self) -> int:
        """Tokens along a side of a picture of the default size."""
        return self.default_sample_size // self.patch_size

    def guidance_by(self, scale: float, **bounds) -> Guidance:
        """The rule that `guidance_scale=scale` stands for; `bounds`: until and renorm."""
        return Guidance(scale, **bounds)

    def _words(self, prompts: list[str], **treatment) -> list[str]:
        """What the tokenizer gets for prompts."""
        raise NotImplementedError

    def _negative_words(self, prompts: list[str]) -> list[str]:
        return prompts

    @torch.no_grad()
    def _texts(
        self, call: Call, guided: bool, parts: Sequence[str] = (), **treatment
    ) -> tuple[Text, Text | None]:
        """Features of the prompts and, if guided, of the negative ones, unless they were given.

        parts: prompts of regions, which come before the others.
        """
        text, negative = call.text, call.negative_text
        jobs = []
        if text is None:
            prompts = [*parts, *call.prompt]
            jobs.append((self._words(prompts, **treatment), prompts))
        if guided and negative is None:
            prompts = call.negative_prompt or [""] * call.batch
            jobs.append((self._negative_words(prompts), prompts))
        if not jobs:
            return text, negative
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("prompts need a text_encoder and a tokenizer, this pipeline has none")
        with self.stage("text_encoder") as encoder:
            device, length = self.device_of(encoder), call.max_sequence_length
            made = [
                encode(self.tokenizer, encoder, words, prompts, length, device)
                for words, prompts in jobs
            ]
        if guided and negative is None:
            negative = made.pop()
        return text or made.pop(), negative

    def _encoded(self, call: Call, guided: bool, device, **treatment) -> tuple[Tensor, ...]:
        """What `encode_prompt` returns where features have masks: both of one length."""
        texts = same_length(*self._texts(call, guided, **treatment))
        result = []
        for text in texts:
            text = text and text.repeated(call.num_images_per_prompt)
            text = text and text.to(device or self._execution_device)
            result += [text and text.feats, text and text.mask.long()]
        return tuple(result)

    def _call(
        self,
        prompt_embeds,
        negative_prompt_embeds,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **shared,
    ) -> Call:
        """The parameters that all families share, with the embeddings that were given."""
        return Call(
            text=self._given("prompt_embeds", prompt_embeds, prompt_attention_mask),
            negative_text=self._given(
                "negative_prompt_embeds", negative_prompt_embeds, negative_prompt_attention_mask
            ),
            **shared,
        )

    def _given(self, name: str, feats, mask: Tensor | None = None) -> Text | None:
        """Embeddings that a caller gave, checked."""
        width = network_of(type(self), self.transformer).config.cap_feat_dim
        return text_of(name, feats, mask, width)

    def _sigmas(self, steps: int, sigmas, ours: Options):
        """Those of the joint models end at 1/steps, the scheduler's own at 0.001."""
        if sigmas is not None or ours.schedule is not None or not is_count(steps):
            return sigmas
        return np.linspace(1, 1 / steps, steps).tolist()

    def _draw(
        self,
        call: Call,
        ours: Options,
        *,
        scale: float,
        guidance: Callable[[Tensor], Guidance] | None,
        texts: Callable[[bool], tuple[Text, Text | None]],
        noise_dtype: torch.dtype | None = None,
        rope_scaling: Callable[[list[Size]], list[RopeScaling | None]] | None = None,
        base_seqlen: int | None = None,
        lora_scale: float | None = None,
    ):
        """Check everything, encode, denoise, decode.

        scale, guidance: what the caller named it, and the rule by the grid (None: not guided);
        `ours` may have another.
        texts: encodes the prompts and, if told to, the negative ones, or takes what was given.
        noise_dtype: that the noise is drawn in; None: the features'.
        rope_scaling: of each picture, by the sizes in pixels.
        """
        plan = make_plan(self, call, ours)
        rule = ours.guidance or (Guidance(1.0) if guidance is None else guidance(plan.grid))
        if not any(map(rule.acts_at, plan.ran.tolist())):  # all that is guided lies before
            rule = Guidance(1.0)
        scalings = [ours.rope_scaling] * len(plan.sizes)
        if ours.rope_scaling is None and rope_scaling is not None:
            scalings = rope_scaling(plan.pixels)
        self._guided, self._interrupt = rule.needed, False
        self._guidance_scale = ours.guidance.scale if ours.guidance else scale

        text, negative = texts(rule.needed)
        whole = {}
        if ours.regions:
            text, whole = place(ours, text, plan.sizes[0], self.patch_size)
        text, negative = (t and t.repeated(call.num_images_per_prompt) for t in (text, negative))
        noise = call.latents
        if noise is None:
            dtype = noise_dtype or text.feats.dtype
            noise = pictures.draw_noise(plan, call.generator, dtype, self._execution_device)
        image, mask = plan.image, plan.mask
        if image is not None:
            with self.stage("vae") as vae:
                image = pictures.encode(vae, image, self.device_of(vae))
            if not plan.ragged:
                image, mask = torch.stack(image), mask and torch.stack(mask)
        latents = denoise(
            self, call, text, negative, plan.timesteps, lora_scale,
            size=plan.sizes if plan.ragged else plan.sizes[0],
            steps=len(plan.grid) - 1, schedule=lambda _: plan.grid,
            solver=ours.solver, rtol=ours.rtol, atol=ours.atol, guidance=rule,
            base_seqlen=base_seqlen if ours.base_seqlen is None else ours.base_seqlen,
            scalings=scalings, context_drop=ours.context_drop,
            latents=noise, image=image, strength=ours.start, mask=mask, **whole,
        )  # fmt: skip
        if noise_dtype is None:
            latents = _each(latents, lambda z: z.to(text.feats.dtype))
        images = latents if call.output_type == "latent" else self._decode(latents, call)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if call.return_dict else (images,)

    def _embeddings(self, text: Text, negative: Text | None) -> dict:
        """What a callback gets to see of the features."""
        return {"prompt_embeds": text.feats, "negative_prompt_embeds": negative and negative.feats}

    def _replaced(self, given: dict, text: Text, negative: Text | None) -> dict[str, Text]:
        """The features that a callback returned, with the masks that they had."""
        return {
            name: Text(like(f"{key} of the callback", given[key], old.feats), old.mask)
            for key, name, old in (
                ("prompt_embeds", "text", text),
                ("negative_prompt_embeds", "negative", negative),
            )
            if key in given and old is not None
        }

    def _decode(self, latents, call: Call):
        with self.stage("vae") as vae:
            if isinstance(latents, Tensor):
                made = pictures.decode(vae, latents, self.device_of(vae))
                return self.image_processor.postprocess(made.detach(), call.output_type)
            device = self.device_of(vae)
            made = [pictures.decode(vae, z[None], device) for z in latents]
            return [self.image_processor.postprocess(z, call.output_type)[0] for z in made]


def _each(latents, change: Callable[[Tensor], Tensor]):
    return change(latents) if isinstance(latents, Tensor) else [change(z) for z in latents]
