"""What the ranks of a process group send to each other, with gradients.

A rank's gradient of a tensor is that of the sum of all ranks' losses, so an exchange has its
transpose as its backward: what was received goes back to where it came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, dout):
        return _AllToAll.apply(dout.contiguous(), ctx.group), None


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """x (n, ...): part i goes to rank i, and part i of the result comes from rank i."""
    return _AllToAll.apply(x.contiguous(), group)


def gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The tensors of all ranks, one after the other along `dim`. Each rank may use them for
    something else; the gradient is the sum over the ranks, always in the same order."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return all_gather(x, dim, group)
    parts = all_to_all(x.expand(group.size(), *x.shape), group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """As `gathered`, without a gradient."""
    out = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
    return out.movedim(0, dim).flatten(dim, dim + 1)


@dataclass(frozen=True)
class Rotation:
    """Tensors on their way round a ring; `wait` returns those that arrive."""

    sent: list[Tensor | None]  # held until they have left
    received: list[Tensor | None]
    requests: list

    def wait(self) -> list[Tensor | None]:
        for request in self.requests:
            request.wait()
        return self.received


def rotate(tensors, group: ProcessGroup) -> Rotation:
    """Start to send the tensors to the next rank of the ring and to receive those of the one
    before; None stays None. All ranks call it with the same shapes, in the same order."""
    n, rank = group.size(), group.rank()
    sent = [None if x is None else x.contiguous() for x in tensors]
    received = [None if x is None else torch.empty_like(x) for x in sent]
    calls = [
        dist.P2POp(call, x, group=group, group_peer=peer % n)
        for call, peer, each in ((dist.isend, rank + 1, sent), (dist.irecv, rank - 1, received))
        for x in each
        if x is not None
    ]
    return Rotation(sent, received, dist.batch_isend_irecv(calls))
