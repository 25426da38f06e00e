"""A run of the sampler, with what diffusers' callbacks expect of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

import lumina
from lumina.models.parts.rope import RopeScaling
from lumina.pipelines.call import Call
from lumina.pipelines.text import Text


def denoise(
    pipe,
    call: Call,
    text: Text,
    negative: Text | None,
    timesteps: Tensor,
    lora_scale: float | None,
    *,
    scalings: Sequence[RopeScaling | None],
    latents,
    image=None,
    mask=None,
    size,
    **options,
):
    """The latents at the end of `lumina.sample`, whose other arguments are `options`.

    Pictures with another scaling run apart, and with dopri5 each of them does.

    timesteps: those of the steps, as a callback of diffusers knows the time.
    scalings: of the positions, for each picture.
    """
    adaptive = options["solver"] == "dopri5"
    pipe._num_timesteps = len(timesteps)
    groups: dict[object, list[int]] = {}
    for i, scaling in enumerate(scalings):
        groups.setdefault((scaling, i if adaptive else None), []).append(i)

    def run(network: nn.Module, rows: list[int], scaling: RopeScaling | None):
        state = {"text": text.rows(rows), "negative": negative and negative.rows(rows)}
        captions = {
            f"{short}_{part}": getattr(state[long], part)
            for short, long in (("cap", "text"), ("neg", "negative"))
            for part in ("feats", "mask")
            if state[long] is not None
        }

        def after_step(i: int, t: float, now):
            bar.update()
            if call.callback_on_step_end is None:
                return None
            time = torch.tensor(1000 * (1 - t)) if adaptive else timesteps[i]
            changes = _told(pipe, call, i, time, now, state, "pooled_feats" in options)
            if pipe._interrupt:
                raise _Interrupted(changes.get("latents", now))
            return changes

        try:
            return lumina.sample(
                network, **captions, callback=after_step, rope_scaling=scaling,
                latents=_rows(latents, rows), image=_rows(image, rows), mask=_rows(mask, rows),
                size=[size[i] for i in rows] if isinstance(size, list) else size, **options,
            ).latents  # fmt: skip
        except _Interrupted as stop:
            return stop.latents

    total = float("inf") if adaptive else len(timesteps) * len(groups)
    with pipe.stage("transformer") as network, pipe.progress_bar(total=total) as bar:
        if hasattr(getattr(network, "_hf_hook", None), "offload"):
            network._hf_hook.pre_forward(network)  # or the sampler would find it on the CPU
        device = pipe.device_of(network)
        text, negative = (t and t.to(device) for t in (text, negative))
        ends = {}
        with _lora(network, lora_scale):
            for (scaling, _), rows in groups.items():
                ends |= zip(rows, run(network, rows, scaling), strict=True)
    each = [ends[i] for i in range(len(scalings))]
    return each if isinstance(size, list) else torch.stack(each)


def _told(pipe, call: Call, i: int, time, latents, state: dict, fixed: bool) -> dict:
    """What a callback changes, as `lumina.sample` has it; `state` keeps the features.

    fixed: whether the features can not change.
    """
    callback, inputs = call.callback_on_step_end, call.callback_on_step_end_tensor_inputs
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        inputs = callback.tensor_inputs
    seen = {"latents": latents}
    if set(inputs) - {"latents"}:
        seen |= pipe._embeddings(**state)
    said = callback(pipe, i, time, {name: seen[name] for name in inputs})
    if said is not None and not isinstance(said, Mapping):
        got = type(said).__name__
        raise TypeError(f"callback_on_step_end must return None or a dict of tensors, got {got}")
    said = said or {}
    changes = {"latents": said["latents"]} if "latents" in said else {}
    if said.keys() & (set(pipe._callback_tensor_inputs) - {"latents"}):
        if fixed:
            raise ValueError("a callback can not change prompt_embeds of regions")
        state.update(pipe._replaced(said, **state))
        for short, long in (("cap", "text"), ("neg", "negative")):
            if (new := state[long]) is not None:
                changes |= {f"{short}_feats": new.feats, f"{short}_mask": new.mask}
    return changes


def _rows(latents, rows: list[int]):
    """Those of some pictures."""
    if latents is None or isinstance(latents, Tensor):
        return latents if latents is None else latents[rows]
    return [latents[i] for i in rows]


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
