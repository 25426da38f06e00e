"""Counts what a process sends and what autograd keeps, in a run of the real network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


# PyTorch's op -> kind of exchange, and the bytes that a rank of n sends, from the arguments.
_SENT = {
    "alltoall_base_": ("all_to_all", lambda n, a: _bytes(a[1]) * (n - 1) // n),
    "allgather_": ("all_gather", lambda n, a: _bytes(a[1][0]) * (n - 1)),
    "_allgather_base_": ("all_gather", lambda n, a: _bytes(a[1]) * (n - 1)),
    "_reduce_scatter_base_": ("reduce_scatter", lambda n, a: _bytes(a[0]) * (n - 1)),
    "allreduce_": ("all_reduce", lambda n, a: _bytes(a[0][0]) * 2 * (n - 1) / n),
    "send": ("send", lambda n, a: _bytes(a[0][0])),
    "recv_": ("recv", lambda n, a: 0),
}


class Sent(TorchDispatchMode):
    """Bytes that this process sends while the mode is on, by kind of exchange."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            kind, count = _SENT[op.overloadpacket.__name__]
            group = next(x for x in args if isinstance(x, torch.ScriptObject))
            self.bytes[kind] += count(ProcessGroup.unbox(group).size(), args)
        return op(*args, **(kwargs or {}))


def kept_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """What autograd keeps of the model's forward for its backward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes, kept = {}, []

    def pack(x):
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    def done(*_):
        kept.append(sum(size for place, size in sizes.items() if place not in own))

    handle = model.register_forward_hook(done)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    handle.remove()
    (found,) = kept
    return found
