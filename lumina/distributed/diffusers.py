"""diffusers' `enable_parallelism` for its Lumina-Next, Lumina-Image 2.0 and Z-Image.

    import lumina.distributed.diffusers
    lumina.distributed.diffusers.register()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))

diffusers has no `_cp_plan` for them. A plan splits tensors into parts of equal length before one
module and gathers them behind another. Theirs have any length and need a mask for the padding then,
so hooks of ours (`ShareTokens`, `GatherTokens`) do it, at the same places: before the first
block that images go through and behind the last. Blocks for captions alone run on every rank.

B batch, L tokens, C = ceil(L / ranks) tokens of a rank.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import diffusers
import torch
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import nn

from lumina.distributed.diffusers_attention import (
    BACKEND,
    Lumina2Processor,
    LuminaNextProcessor,
    register_backend,
    sequence_parallel,
)
from lumina.distributed.sequence import SequenceParallel


@dataclass(frozen=True)
class _Family:
    """attention: a block's self-attention, with a processor of the class `stock`; `own` makes the
    one in its place, None keeps it. stages: blocks and the modules that follow them; "" for none,
    where the last block's output is gathered."""

    attention: str
    stock: type
    own: type | None
    stages: tuple[tuple[str, str], ...]


FAMILIES = {
    "LuminaNextDiT2DModel": _Family(
        "attn1", LuminaAttnProcessor2_0, LuminaNextProcessor, (("layers", "norm_out"),)
    ),
    "Lumina2Transformer2DModel": _Family(
        "attn", Lumina2AttnProcessor2_0, Lumina2Processor,
        (("noise_refiner", ""), ("layers", "norm_out")),
    ),
    "ZImageTransformer2DModel": _Family(
        "attention", ZSingleStreamAttnProcessor, None,
        (("noise_refiner", ""), ("layers", "all_final_layer")),
    ),
}  # fmt: skip


def register() -> None:
    """Make `enable_parallelism(config=ContextParallelConfig(...))` work for the three models, and
    `set_attention_backend("lumina")` for all models whose attention goes through diffusers'
    dispatch, with or without parallelism (that of Lumina-Next and Lumina 2 does not without).

    A call of the three then takes the same arguments on every rank and gives each the whole
    result. The mean over the ranks of each gradient is that of one process.
    """
    register_backend()
    for name in FAMILIES:
        kind = getattr(diffusers, name)
        kind._cp_plan = {}  # there is nothing left to split for diffusers' own hooks
        kind.enable_parallelism = _enable_parallelism
        kind._resolve_parallel_config = _resolve_parallel_config


def _resolve_parallel_config(self, config):
    """As diffusers does, which divides by the number of accelerators, on a CPU too."""
    context, initialized = _context_of(config), torch.distributed.is_initialized()
    if context is None or torch.accelerator.device_count() or not initialized:
        return ModelMixin._resolve_parallel_config(self, config)
    config = ParallelConfig(context)
    mesh = context.mesh or torch.distributed.init_device_mesh(
        "cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names
    )
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config.setup(rank, world, torch.device("cpu"), mesh=mesh)
    self._parallel_config = config
    return config


def _enable_parallelism(self, *, config, cp_plan=None) -> None:
    """`ModelMixin.enable_parallelism`, after which the ranks share the tokens of images.

    Raises:
        ValueError: cp_plan, ulysses_anything or ring_anything is given, or an attention has a
            processor or a backend that does not know of the other ranks.
    """
    context = _context_of(config)
    if context is None or self._parallel_config is not None:  # which diffusers refuses
        return ModelMixin.enable_parallelism(self, config=config, cp_plan=cp_plan)
    if context.ulysses_anything or context.ring_anything:
        raise ValueError("any length is taken without ulysses_anything or ring_anything")
    if cp_plan is not None:
        raise ValueError(f"{type(self).__name__} is split by hooks of lumina and takes no cp_plan")
    family = FAMILIES[next(kind.__name__ for kind in type(self).mro() if kind.__name__ in FAMILIES)]
    stages = [(getattr(self, blocks), end) for blocks, end in family.stages]
    for block in (block for blocks, _ in stages for block in blocks):
        processor = getattr(block, family.attention).processor
        _check_processor(processor, family)
        if hasattr(processor, "_attention_backend"):  # else diffusers asks for the process's own
            processor._attention_backend = BACKEND
    ModelMixin.enable_parallelism(self, config=config, cp_plan=None)

    for attention in (m for m in self.modules() if isinstance(m, Attention)):
        if hasattr(attention.processor, "_parallel_config"):
            attention.processor._parallel_config = None  # of captions, which every rank has whole
    parallel = sequence_parallel(self._parallel_config.context_parallel_config)
    for blocks, end in stages:
        tokens = Tokens(parallel)
        for i, block in enumerate(blocks):
            attention = getattr(block, family.attention)
            if family.own is not None:
                attention.processor = family.own(tokens)
            attention.processor._parallel_config = self._parallel_config
            _add(ShareTokens(tokens, attention, is_first=i == 0), block)
        if end:
            last = getattr(self, end)
            for module in last.values() if isinstance(last, nn.ModuleDict) else [last]:
                _add(GatherTokens(tokens, is_block=False), module)
        elif len(blocks):
            _add(GatherTokens(tokens, is_block=True), blocks[-1])
    _add(ShareControls(parallel), self)


def _context_of(config) -> ContextParallelConfig | None:
    is_context = isinstance(config, ContextParallelConfig)
    return config if is_context else getattr(config, "context_parallel_config", None)


def _check_processor(processor, family) -> None:
    if type(processor) is not family.stock:
        raise ValueError(
            f"attention must have diffusers' own processor {family.stock.__name__} to be shared, "
            f"got {type(processor).__name__}"
        )
    chosen = getattr(processor, "_attention_backend", None)
    if chosen not in (None, BACKEND):
        raise ValueError(f'the attention backend must be "{BACKEND}" in parallel, got "{chosen}"')


def _add(hook: ModelHook, module: nn.Module) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, f"lumina---{type(hook).__name__}")


@dataclass
class Tokens:
    """Of a row of blocks. length: L of the call that is running, from its first block on."""

    parallel: SequenceParallel
    length: int | None = None


class _NamedArguments(ModelHook):
    """A hook that gets a call's arguments by name."""

    def initialize_hook(self, module):
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    def pre_forward(self, module, *args, **kwargs):
        given = dict(zip(self.names, args, strict=False)) | kwargs
        self.change(given)
        return (), given

    def change(self, given: dict) -> None:
        raise NotImplementedError


class ShareTokens(_NamedArguments):
    """Before a block: the rank's tokens, their rotations and their mask, which hides padding."""

    def __init__(self, tokens: Tokens, attention: Attention, is_first: bool):
        super().__init__()
        self.tokens, self.attention, self.is_first = tokens, attention, is_first

    def change(self, given):
        x, mask, rotation = self.names[:3]  # these three have other names in Z-Image
        parallel, h, L = self.tokens.parallel, given[x], given[rotation].shape[1]
        backend = self.attention.processor._attention_backend
        if backend != BACKEND:
            raise ValueError(
                f'the attention backend must be "{BACKEND}" in parallel, got "{backend}"'
            )
        expected = L if self.is_first else -(-L // parallel.size)
        if h.shape[1] != expected:
            raise ValueError(f"a block must get {expected} tokens on this rank, got {h.shape[1]}")
        self.tokens.length = L
        if self.is_first:
            given[x] = parallel.shard(h, 1)
        whole = None if given[mask] is None else given[mask].to(torch.bool)
        like = h.new_empty(()).expand(h.shape[0], L)
        given[mask] = parallel.key_mask(whole, like)
        given[rotation] = parallel.shard(given[rotation], 1)
        _share(given, "noise_mask", parallel)


class GatherTokens(_NamedArguments):
    """Behind the last block, or the layer that follows it: the tokens of all ranks."""

    def __init__(self, tokens: Tokens, is_block: bool):
        super().__init__()
        self.tokens, self.is_block = tokens, is_block

    def change(self, given):
        if not self.is_block:
            _share(given, "noise_mask", self.tokens.parallel)

    def post_forward(self, module, output):
        return self.tokens.parallel.gather(output, 1, self.tokens.length)


class ShareControls(_NamedArguments):
    """Before a Z-Image: what a ControlNet adds between the blocks to the rank's tokens."""

    def __init__(self, parallel: SequenceParallel):
        super().__init__()
        self.parallel = parallel

    def change(self, given):
        controls = given.get("controlnet_block_samples")
        if controls is not None:
            given["controlnet_block_samples"] = {
                i: self.parallel.shard(x, 1) for i, x in controls.items()
            }


def _share(given: dict, name: str, parallel: SequenceParallel) -> None:
    if given.get(name) is not None:
        given[name] = parallel.shard(given[name], 1)
