"""Ring attention (arXiv 2310.01889): keys go from rank to rank, queries stay where they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lumina.distributed.exchange import rotate
from lumina_kernels import gqa_attention, merge_attention


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None,
    group: ProcessGroup, backend: str | None,
) -> Tensor:  # fmt: skip
    """Attention of the rank's queries to the keys of all ranks, in float32 (float64 for float64).

    Every rank holds two chunks of keys at most, the one it computes with and the one that arrives.
    The backward goes round the ring again and computes each part again, so what is kept for it is
    the rank's own too.

    Args:
        q: (B, C, H, K).
        k, v: the rank's, (B, C, G, K).
        key_mask: of the rank's keys, (B, C) bool; None on all ranks or on none.
        bias: of the rank's keys, (B, 1, 1, C); None on all ranks or on none.
        group: the ranks, in the order of the ring.
        backend: of `gqa_attention`.
    """
    return _Ring.apply(q, k, v, key_mask, bias, group, backend)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, bias, group, backend):
        keys, merged = (k, v, key_mask, bias), None
        for hop in range(group.size()):
            last = hop + 1 == group.size()
            arriving = None if last else rotate(keys, group)
            part = _part(q, *keys, backend)
            merged = part if merged is None else merge_attention(*merged, *part)
            keys = keys if last else arriving.wait()
        ctx.group, ctx.backend = group, backend
        ctx.save_for_backward(q, k, v, key_mask, bias, *merged)
        return merged[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        """With w_i = exp(lse_i - lse), out = sum of w_i out_i over the parts i of the keys, so
        dout_i = w_i dout and dlse_i = w_i dout . (out_i - out). The gradients of keys travel with
        them, and once more at the end, which brings them home."""
        q, *keys, out, lse = ctx.saved_tensors
        group, dq, arriving_grads = ctx.group, 0, None
        for hop in range(group.size()):
            last = hop + 1 == group.size()
            arriving = None if last else rotate(keys, group)
            k, v, key_mask, bias = keys
            with torch.enable_grad():
                needs = True, True, True, ctx.needs_input_grad[4]
                each = zip((q, k, v, bias), needs, strict=True)
                leaves = [x if x is None else x.detach().requires_grad_(n) for x, n in each]
                own_q, own_k, own_v, own_bias = leaves
                part = _part(own_q, own_k, own_v, key_mask, own_bias, ctx.backend)
            weight = (part[1].detach() - lse).exp().unsqueeze(-1)
            dpart = weight * dout
            dlse = (dpart * (part[0].detach() - out)).sum(-1)
            own, *grads = _gradients(part, leaves, (dpart.to(q.dtype), dlse))
            dq = dq + own
            if hop > 0:
                before = arriving_grads.wait()
                grads = [g if g is None else g + b for g, b in zip(grads, before, strict=True)]
            arriving_grads = rotate(grads, group)
            keys = keys if last else arriving.wait()
        dk, dv, dbias = arriving_grads.wait()
        dbias = None if dbias is None else dbias.to(keys[3].dtype)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, dbias, None, None


def _part(q, k, v, key_mask, bias, backend):
    """Attention to a part of the keys, and its log-sum-exp."""
    return gqa_attention(q, k, v, key_mask, bias=bias, return_lse=True, backend=backend)


def _gradients(outputs, leaves, douts):
    """In the dtype in which sums over the parts are exact enough; None for what needs none."""
    acc = torch.promote_types(outputs[0].dtype, torch.float32)
    needs = [x is not None and x.requires_grad for x in leaves]
    wanted = [x for x, needed in zip(leaves, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(outputs, wanted, douts))
    return [next(found).to(acc) if needed else None for needed in needs]
