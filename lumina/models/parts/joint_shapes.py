"""The sizes of a joint network, by the shapes of its tensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from lumina.checkpoints.files import length_of, shape_of


def joint_sizes(where: Path, tensors: dict[str, Tensor], side: int = 2) -> dict[str, int]:
    """Fields of a `JointConfig`, and `ffn_dim`, for patches of side x side.

    Raises:
        ValueError: shapes that no such network has.
    """
    shape = partial(shape_of, where, tensors)
    dim, patch = shape("x_embedder.weight", 2)
    rows, _ = shape("layers.0.attention.qkv.weight", 2)
    (head_dim,) = shape("layers.0.attention.q_norm.weight", 1)
    hidden, _ = shape("layers.0.feed_forward.w1.weight", 2)
    (text,) = shape("cap_embedder.0.weight", 1)
    kv_heads, odd = divmod(rows - dim, 2 * head_dim)
    if patch % side**2 or dim % head_dim or odd or kv_heads < 1:
        raise ValueError(
            f"{where} is no network with {side}x{side} patches: x_embedder.weight is {dim, patch}, "
            f"attention.qkv.weight {rows, dim}, a head {head_dim}"
        )
    return dict(
        patch_size=side, in_channels=patch // side**2, dim=dim, n_heads=dim // head_dim,
        n_kv_heads=kv_heads, cap_feat_dim=text, n_layers=length_of("layers", tensors),
        n_refiner_layers=length_of("noise_refiner", tensors), ffn_dim=hidden,
    )  # fmt: skip
