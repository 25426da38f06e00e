"""The block of the family: norms before and after attention, and before and after the FFN."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lumina.models.parts import norms
from lumina.models.parts.feed_forward import FeedForward


class SandwichBlock(nn.Module):
    """h + tanh(gate) * norm2(layer(norm1(h) * (1 + scale))), for attention, then for the FFN.

    The last sum of a block and the first norm of the next are one pass over memory, so a block
    returns the parts of its sum, and the next one starts by adding them up: the carry of
    `lumina.models.parts.norms`. Each block reads only its own parameters, and the carry holds
    copies, so a block can be sharded, offloaded, checkpointed or compiled on its own.

    Args:
        dim, hidden: widths of the block and of its FFN.
        eps: of the norms.
        attention: the layer that `attend` of `sandwich` calls.
        backend: of the ops.
    """

    def __init__(
        self, dim: int, hidden: int, eps: float, attention: nn.Module, backend: str | None
    ):
        super().__init__()
        self.eps, self.backend = eps, backend
        self.attention = attention
        self.feed_forward = FeedForward(dim, hidden, backend)
        self.attention_norm1, self.attention_norm2 = (norms.RMSNorm(dim, eps) for _ in range(2))
        self.ffn_norm1, self.ffn_norm2 = (norms.RMSNorm(dim, eps) for _ in range(2))

    def sandwich(
        self,
        carry: norms.Carry,
        modulation: Tensor | None,
        attend: Callable[[Tensor], Tensor],
        keep: int | None = None,
    ) -> norms.Carry:
        """The carry after this block.

        Args:
            carry: of the block before, (h, None, None, None) at first.
            modulation: scale and gate of attention, scale and gate of the FFN, (B, 4 D); None:
                neither scales nor gates.
            attend: attention's output for its normed input.
            keep: how many tokens, the first ones, go on; None: all. As many come out of `attend`.
        """
        eps, backend = self.eps, self.backend
        scale_msa = gate_msa = scale_mlp = gate_mlp = None
        if modulation is not None:
            scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        h, pre = norms.pre_norm(self.attention_norm1, scale_msa, carry, eps, backend)
        out = attend(pre)
        h = h if keep is None else h[:, :keep]
        carry = norms.post_norm(self.attention_norm2, out, h, gate_msa, eps)
        h, pre = norms.pre_norm(self.ffn_norm1, scale_mlp, carry, eps, backend)
        out = self.feed_forward(pre)
        h, out, weight, gate = norms.post_norm(self.ffn_norm2, out, h, gate_mlp, eps)
        if out is None:
            return h, None, None, None
        # Copies: the parameter may be freed or offloaded once this block returns, and FSDP warns
        # about views.
        return h, out, weight.clone(), None if gate is None else gate.clone()
