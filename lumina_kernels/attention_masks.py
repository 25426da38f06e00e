"""The masks of other people's attentions, as `gqa_attention` takes them."""

import torch
from torch import Tensor


def key_mask_and_bias(mask: Tensor, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`key_mask`, or `bias`, for a mask that broadcasts to (B, H, L, L_kv), as
    `scaled_dot_product_attention` reads it: True is attended to, a float is added to the score.

    Args:
        mask: bool or floating, 4 dimensions. A bool one that no head or query changes becomes a
            key mask, which costs nothing; any other a bias of 0 and -inf.
        q: queries of batch size B, whose dtype the bias gets.
    """
    if mask.dtype != torch.bool:
        return None, mask
    if mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0].expand(q.shape[0], -1), None
    zeros = torch.zeros_like(mask, dtype=q.dtype)
    return None, zeros.masked_fill(~mask, -torch.inf)
