"""Attention to all keys from attentions to parts of them."""

import torch
from torch import Tensor

from lumina_kernels.ops.gqa_attention import LSE_FLOOR


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return attention to the keys of a and of b, from those of `gqa_attention(return_lse=True)`.

        lse = log(exp(lse_a) + exp(lse_b)),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Ring attention (arXiv 2310.01889) and splits of long sequences are chains of these: each part
    may have keys, masks and a bias of its own, a merge is an `out_a` again, and the order matters
    to the last bits only. It is plain PyTorch, with gradients through all four. A part without a
    valid key, of a row, leaves the other one as it is; both give 0 and the floor, no NaN.

    Args:
        out_a, out_b: (B, L, H, K).
        lse_a, lse_b: (B, L, H).

    Returns:
        out and lse in float32 (float64 if one is), not rounded to 16 bits: round what the last
        merge of a chain returns, `out.to(q.dtype)`.
    """
    no_a, no_b = lse_a == LSE_FLOOR, lse_b == LSE_FLOOR
    above = (lse_a - lse_b).masked_fill(no_a, -torch.inf).masked_fill(no_b, torch.inf)
    lse = torch.logaddexp(lse_a, lse_b)
    lse = torch.where(no_b, lse_a, torch.where(no_a, lse_b, lse))
    out = out_a * above.sigmoid().unsqueeze(-1) + out_b * (-above).sigmoid().unsqueeze(-1)
    return out, lse
