"""Gradients that may be missing, through ops whose outputs have to be tensors."""

from torch import Tensor


def to_outputs(grads: list[Tensor | None], like: Tensor) -> list[Tensor]:
    """An empty tensor for None."""
    return [like.new_empty(0) if grad is None else grad for grad in grads]


def from_outputs(grads: list[Tensor], inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """None where there was no input."""
    return [None if x is None else grad for grad, x in zip(grads, inputs, strict=True)]


def fake_like(*inputs: Tensor | None) -> list[Tensor]:
    """Contiguous gradients, shaped as the inputs, of which the first is there."""
    return to_outputs([None if x is None else x.new_empty(x.shape) for x in inputs], inputs[0])
