"""The tensors of a network as its plain class names them, whatever was put around it or into it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lumina.checkpoints.files import unusual
from lumina.models.families import FAMILIES, Config, name_of

NETWORKS = tuple(
    kind for family in FAMILIES.values() for kind in (family.network, family.reference)
)
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16} | {
    getattr(torch, f"float8_{kind}") for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")
}
# Modules that compute what the one within does: torch.compile, activation checkpointing, FSDP1, and
# PEFT, whose layers `_merged` looks at.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)(?:\.|$)"
)


def expected_shapes(config: Config) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a network, which is not built for it."""
    lengths = {stack: getattr(config, field) for stack, field in config.stacks.items()}
    with torch.device("meta"):
        shortest = replace(config, **dict.fromkeys(config.stacks.values(), 1))
        one = FAMILIES[name_of(config)].network(shortest).state_dict()
    shapes = {}
    for name, tensor in one.items():
        stack, *rest = name.split(".0.", 1)
        if stack not in lengths:
            shapes[name] = tensor.shape
            continue
        shapes |= {f"{stack}.{i}.{rest[0]}": tensor.shape for i in range(lengths[stack])}
    return shapes


def network_in(model: nn.Module, kinds: tuple[type, ...] = NETWORKS) -> nn.Module:
    """The network within torch.compile, DDP, FSDP, PEFT or no wrapper.

    Raises:
        ValueError: there is none, or several.
    """
    found = [module for module in model.modules() if isinstance(module, kinds)]
    if len(found) != 1:
        names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        got = f"a {type(model).__name__} with {len(found)}"
        raise ValueError(f"model must be or contain one {names}, got {got}")
    return found[0]


@contextmanager
def one_writer(model: nn.Module) -> Iterator[bool]:
    """Whether this process writes: the first of those that share the parameters; others wait."""
    groups = []
    for module in model.modules():
        if hasattr(module, "_fsdp_wrapped_module") and not groups:
            groups = [module.process_group]
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "full_tensor") and not groups:
                groups = parameter.device_mesh.get_all_groups()
    try:
        yield all(dist.get_rank(group) == 0 for group in groups)
    finally:
        for group in groups:
            dist.barrier(group)


@torch.no_grad()
def plain_state(
    model: nn.Module, network: nn.Module, expected: dict[str, torch.Size], keep: bool = True
) -> dict[str, Tensor]:
    """State dict in the form safetensors accepts; shares memory with the module where it can.

    Args:
        model: what was passed in; the state dict is taken of it, because FSDP gathers there.
        network: the network within.
        expected: what the plain class has.
        keep: False: take part in the gathering and drop the tensors.

    Raises:
        ValueError: a network that a plain one with plain tensors does not stand for.
    """
    path = next(name for name, module in model.named_modules() if module is network)
    prefix = WRAPPERS.sub("", f"{path}.") if path else ""
    state = {
        name.removeprefix(prefix): tensor
        for key, tensor in model.state_dict().items()
        if (name := WRAPPERS.sub("", key)).startswith(prefix)
    }
    _replace_parametrized(network, state)
    _merged(network, state)
    plain, storages = {}, set()
    _check(network, state, expected)
    for name in expected:
        tensor = state[name].detach()
        if hasattr(tensor, "full_tensor"):  # a DTensor
            tensor = tensor.full_tensor()
        if not keep:
            continue
        if kind := unusual(tensor):
            raise ValueError(
                f"{name} must be a plain tensor to be saved, got {kind}: save the network before "
                "it is quantised, offloaded or otherwise converted"
            )
        tensor = tensor.cpu().contiguous()
        # Tied weights are stored as often as there are names.
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()
        storages.add(storage)
        plain[name] = tensor
    return plain


def _replace_parametrized(network: nn.Module, state: dict[str, object]) -> None:
    """Put the tensors that parametrizations compute in the place of what they compute them from."""
    for path, module in network.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        clean = WRAPPERS.sub("", f"{path}.") if path else ""
        for key in [key for key in state if key.startswith(f"{clean}parametrizations.")]:
            del state[key]
        training = module.parametrizations.training
        module.parametrizations.eval()  # spectral_norm changes its buffers while it is trained
        state.update((clean + name, getattr(module, name)) for name in module.parametrizations)
        module.parametrizations.train(training)


def _merged(network: nn.Module, state: dict[str, object]) -> None:
    """Leave out adapters of PEFT that have no influence; the others cannot be said."""
    for path, module in network.named_modules():
        if not (hasattr(module, "base_layer") and hasattr(module, "merged")):
            continue
        if module.merged == module.disable_adapters:
            raise ValueError(
                f"{path} has an adapter that is not merged, which this format has no place for: "
                "call merge_and_unload() or merge_adapter() first, or save the adapter with PEFT"
            )
        path = WRAPPERS.sub("", f"{path}.")
        base = {WRAPPERS.sub("", f"{path}{name}") for name in module.base_layer.state_dict()}
        for key in [key for key in state if key.startswith(path) and key not in base]:
            del state[key]


def _check(network: nn.Module, state: dict[str, object], expected: dict[str, torch.Size]) -> None:
    """Refuse what `load` would: names, shapes and kinds of tensors that are not as expected."""
    for name, shape in expected.items():
        if name not in state:
            modules = {WRAPPERS.sub("", f"{p}.")[:-1]: m for p, m in network.named_modules()}
            owner, _, leaf = name.rpartition(".")
            kind = type(modules[owner]) if owner in modules else None
            got = f"{kind.__module__}.{kind.__name__}" if kind else "nothing"
            raise ValueError(
                f"{owner} must have a plain {leaf} to be saved, got {got}: save the network before "
                "it is quantised or pruned or its modules are replaced, or undo that"
            )
        tensor = state[name]
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{name} must have shape {tuple(shape)} by the network's config, got {got}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be of floating point to be saved, got {tensor.dtype}")
    if foreign := next((name for name in state if name not in expected), None):
        raise ValueError(
            f"{foreign} is not part of a {type(network).__name__}, so `load` could not read it back"
        )
