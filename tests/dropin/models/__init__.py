"""Small random diffusion transformers: every class of diffusers that is one, with the head_dims of
the released models, some of them with other options too, and two that are in no library."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from models import cross, flux, joint, lumina, others, videos, wan

FAMILIES = (lumina, flux, joint, cross, wan, videos, others)
MODELS: dict[str, Callable] = {build.__name__: build for f in FAMILIES for build in f.BUILDERS}


def make(name: str, seed: int = 0) -> tuple[nn.Module, dict]:
    """A model in eval mode whose parameters are all random, also those that begin as 0 or 1, and
    inputs for it."""
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=0.3, std=0.3)
    return model.eval(), inputs


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `from_pretrained` loads a model: some classes keep modules of theirs in float32, and then
    all buffers that are not saved."""
    kept = getattr(model, "_keep_in_fp32_modules", None)
    if not kept:
        return model.to(dtype)
    saved = model.state_dict(keep_vars=True)
    for name, x in saved.items():
        if x.is_floating_point() and not any(part in kept for part in name.split(".")):
            x.data = x.data.to(dtype)
    return model


def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    """All that a model returns, as one vector."""
    leaves = tree_leaves(model(**inputs))
    return torch.cat([x.flatten() for x in leaves if isinstance(x, torch.Tensor)])


def cast(inputs, dtype: torch.dtype):
    """Inputs with their floating tensors in a dtype, but for tables, which are in tuples, and
    coordinates."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {k: x if k.endswith("_ids") else cast(x, dtype) for k, x in inputs.items()}
    return [cast(x, dtype) for x in inputs] if isinstance(inputs, list) else inputs
