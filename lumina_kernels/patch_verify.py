"""`patch(..., verify=True)`: whether a block is as accurate as it was."""

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def verify(path: str, block: nn.Module, run: Callable, args: tuple, kwargs: dict) -> None:
    """Raise if `run` is less accurate than the block's own forward."""

    def outputs(module, forward, dtype=None):
        a, k = tree_map(lambda x: _copied(x, dtype), (args, kwargs))
        with _as_it_was(module, devices):
            return [x.double() for x in tree_leaves(forward(*a, **k)) if isinstance(x, Tensor)]

    if any("forward" in vars(module) for module in block.modules()):
        raise ValueError(
            "verify=True needs blocks whose forward is their own: add caches and offloading after "
            "the first forward"
        )
    tensors = [x for x in (*tree_leaves((args, kwargs)), *block.parameters())
               if isinstance(x, Tensor)]  # fmt: skip
    if any(x.is_meta for x in tensors):
        return  # there are no numbers to compare
    device = next((x.device.type for x in tensors), "cpu")
    devices = {x.device for x in tensors if x.device.type != "cpu"}
    narrow = any(p.is_floating_point() and p.itemsize < 4 for p in block.parameters())
    narrow = narrow or torch.is_autocast_enabled(device)
    with torch.no_grad():
        own, got = outputs(block, block.forward), outputs(block, run)
        truth = own
        if narrow:
            wide = copy.deepcopy(block).float()
            with torch.autocast(device, enabled=False):
                truth = outputs(wide, wide.forward, torch.float32)
    for all_of in zip(own, got, truth, strict=True):
        finite = all_of[0].isfinite()
        if not torch.equal(finite, all_of[1].isfinite()):
            raise ArithmeticError(f"{path}: other elements are finite than were")
        before, after, exact = (x[finite & all_of[2].isfinite()] for x in all_of)
        if exact.numel() == 0:
            continue
        rms, error = exact.square().mean().sqrt(), (after - exact).abs().max()
        allowed = 2e-5 * rms
        if narrow:
            error, was = ((x - exact).square().mean().sqrt() for x in (after, before))
            allowed = allowed + 1.15 * was
        if not error <= allowed:
            raise ArithmeticError(f"{path}: error {error:.2e} where {allowed:.2e} is allowed")


@contextlib.contextmanager
def _as_it_was(module: nn.Module, devices: set):
    """Buffers and random numbers are afterwards what they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(devices, device_type=kind):
        yield
    for buffer, before in buffers:
        buffer.copy_(before)


def _copied(x, dtype: torch.dtype | None):
    if not isinstance(x, Tensor):
        return x
    return x.to(dtype, copy=True) if dtype and x.is_floating_point() else x.clone()
