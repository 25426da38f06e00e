"""Checks of an op's arguments: types and shapes only, never values, so that they trace and no
device is waited for."""

import torch
from torch import Tensor

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def check_axes(name: str, tensor: Tensor, axes: str) -> None:
    """`tensor` is floating with as many dimensions as `axes`, as in "B, L, D"."""
    check_floating(name, tensor)
    if tensor.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must have shape ({axes}), got {tuple(tensor.shape)}")


def check_float(name: str, tensor: Tensor, device: torch.device, *shapes: tuple) -> None:
    """`tensor` is floating, on `device`, and has one of `shapes`."""
    # One call where all is well: an op has a dozen arguments, and the host counts microseconds.
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype in FLOATS
        and tensor.shape in shapes
        and tensor.device == device
    ):
        return
    check_floating(name, tensor)
    check_shape(name, tensor, device, *shapes)


def check_optional(name: str, tensor: Tensor | None, device: torch.device, *shapes: tuple) -> None:
    """`tensor` is None, or as for `check_float`."""
    if tensor is not None:
        check_float(name, tensor, device, *shapes)


def check_broadcasts(name: str, tensor: Tensor | None, device: torch.device, shape: tuple) -> None:
    """`tensor` is None, or floating, on `device`, and broadcasts to `shape`."""
    if tensor is None:
        return
    check_floating(name, tensor)
    check_shape(name, tensor, device, tensor.shape)
    pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.ndim > len(shape) or not all(size in (1, whole) for size, whole in pairs):
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got {tuple(tensor.shape)}")


def are_like(
    dtype: torch.dtype, device: torch.device, shape: tuple, *tensors: Tensor | None
) -> bool:
    """Whether `tensors` are all of that kind. Where they are, one call saves a check of each."""
    for x in tensors:
        if not (
            isinstance(x, Tensor) and x.dtype is dtype and x.shape == shape and x.device == device
        ):
            return False
    return True


def check_mask(name: str, tensor: Tensor | None, device: torch.device, *shapes: tuple) -> None:
    """`tensor` is None, or bool, on `device`, and with one of `shapes`."""
    if tensor is None:
        return
    check_shape(name, tensor, device, *shapes)
    if tensor.dtype is not torch.bool:
        raise TypeError(f"{name} must be bool (True: the key counts), got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, device: torch.device, *shapes: tuple) -> None:
    """`tensor` is on `device` and has one of `shapes`."""
    _check_is_tensor(name, tensor)
    # Only of the same rank: comparing (B, L, 3) with (L, 3) would tell an export that B is not L.
    found, rank = tensor.shape, tensor.ndim
    for shape in shapes:
        if rank == len(shape) and found == shape:
            break
    else:
        rule = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {rule}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_same_dtype(**tensors: Tensor) -> None:
    """All tensors share the dtype of the first."""
    (first, reference), *others = tensors.items()
    dtype = reference.dtype
    for name, tensor in others:
        if tensor.dtype is not dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {reference.dtype}, got {tensor.dtype}"
            )


def check_floating(name: str, tensor: Tensor) -> None:
    """`tensor` is a tensor of a dtype that the ops compute with."""
    if not isinstance(tensor, Tensor):
        _check_is_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _check_is_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
