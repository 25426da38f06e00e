"""A run of the sampler, with what diffusers' callbacks expect of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

import lumina
from lumina.pipelines.call import Call
from lumina.pipelines.text import Text


def denoise(
    pipe,
    call: Call,
    text: Text,
    negative: Text | None,
    timesteps: Tensor,
    lora_scale: float | None,
    **options,
):
    """The latents at the end of a run of `lumina.sample`, whose other arguments are `options`.

    timesteps: those of the steps, as a callback of diffusers knows the time.
    """
    adaptive = options["solver"] == "dopri5"
    pipe._num_timesteps = len(timesteps)
    callback, inputs = call.callback_on_step_end, call.callback_on_step_end_tensor_inputs
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        inputs = callback.tensor_inputs
    state = {"text": text, "negative": negative}

    def after_step(i: int, t: float, latents):
        bar.update()
        if callback is None:
            return None
        time = torch.tensor(1000 * (1 - t)) if adaptive else timesteps[i]
        seen = {"latents": latents}
        if set(inputs) - {"latents"}:
            seen |= pipe._embeddings(**state)
        said = callback(pipe, i, time, {name: seen[name] for name in inputs}) or {}
        changes = {"latents": said["latents"]} if "latents" in said else {}
        if said.keys() & {"prompt_embeds", "negative_prompt_embeds"}:
            state.update(pipe._replaced(said, **state))
            for short, long in (("cap", "text"), ("neg", "negative")):
                if (new := state[long]) is not None:
                    changes |= {f"{short}_feats": new.feats, f"{short}_mask": new.mask}
        if pipe._interrupt and not adaptive:
            raise _Interrupted(changes.get("latents", latents))
        return changes

    total = float("inf") if adaptive else len(timesteps)
    with pipe.stage("transformer") as network, pipe.progress_bar(total=total) as bar:
        if hasattr(getattr(network, "_hf_hook", None), "offload"):
            network._hf_hook.pre_forward(network)  # or the sampler would find it on the CPU
        device = pipe.device_of(network)
        text, negative = (t and t.to(device) for t in (text, negative))
        with _lora(network, lora_scale):
            try:
                return lumina.sample(
                    network, text.feats, text.mask, negative and negative.feats,
                    negative and negative.mask, callback=after_step, **options,
                ).latents  # fmt: skip
            except _Interrupted as stop:
                return stop.latents


def like(name: str, value: Tensor, old: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must keep the shape {tuple(old.shape)}, got {got}")
    return value


class _Interrupted(Exception):
    """Ends a run of the sampler from within its callback."""

    def __init__(self, latents):
        self.latents = latents


@contextmanager
def _lora(network: nn.Module, scale: float | None) -> Iterator[None]:
    """Adapters at `scale` times their weight."""
    if scale is None:
        yield
        return
    scale_lora_layers(network, scale)
    try:
        yield
    finally:
        unscale_lora_layers(network, scale)
