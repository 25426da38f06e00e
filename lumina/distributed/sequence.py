"""Sequence parallelism: the tokens of an image are spread over processes.

B batch, L tokens, C tokens of a rank, H query heads, G key/value heads, K head_dim; U ranks of a
Ulysses group, R ranks of a ring, U R ranks in all.

Token i is on rank i // C of the sequence, and that rank is number `ring * U + ulysses`: the chunks
of a Ulysses group lie side by side, and together they are a chunk of the ring.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup

from lumina.distributed.exchange import all_gather, all_to_all, gathered
from lumina.distributed.ring import ring_attention
from lumina_kernels import gqa_attention
from lumina_kernels.checks import check_axes, check_mask, check_same_dtype, check_shape

Pool = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def _uncompiled(method):
    """`torch.compiler.disable`, which takes seconds to import, only where there is a compiler.

    It would trace the exchanges in part, by one graph for the piece between any two of them.
    """

    @functools.wraps(method)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return call


@dataclass(frozen=True)
class SequenceParallel:
    """The processes that share a sequence, a grid of R x U of them.

    Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): for attention alone, ranks exchange tokens for
    heads, so that each has all tokens of some heads. Ring (Ring Attention, arXiv 2310.01889): keys
    and values go round, and each rank merges attentions to parts of them. Together they are USP
    (arXiv 2405.07719): a ring of Ulysses groups.

    **Gradients.** Every rank computes the same loss, from what `gather` returns. Then the mean over
    the ranks of each gradient, of parameters and of inputs, is that of one process; it is what DDP
    and FSDP do. (Between `shard` and `gather` a rank's gradient is U R times its share of the whole
    one; before and after, it is the whole one. The mean makes the same of both.)

    Args:
        ring: the ranks with this rank's number in their Ulysses groups; None: this one alone.
        ulysses: the ranks of this one's Ulysses group; None: this one alone.
    """

    ring: ProcessGroup | None = None
    ulysses: ProcessGroup | None = None

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> SequenceParallel:
        """Of the dimensions "ring" and "ulysses" of a mesh; the others hold other sequences.

        Raises:
            ValueError: the mesh has neither.
        """
        names = mesh.mesh_dim_names or ()
        groups = {n: mesh.get_group(n) for n in ("ring", "ulysses") if n in names}
        if not groups:
            raise ValueError(f'mesh must have a dimension "ring" or "ulysses", got {names}')
        return cls(**groups)

    def __post_init__(self):
        for name in ("ring", "ulysses"):
            if _size(getattr(self, name)) == 1:
                object.__setattr__(self, name, None)

    def __deepcopy__(self, memo) -> SequenceParallel:
        return self  # process groups have no copies

    def share(self, network: nn.Module) -> None:
        """Have a network share its tokens among these processes, or where there is one keep them.

        Raises:
            ValueError: the network cannot, or U does not divide its query heads.
        """
        able = hasattr(network, "sequence_parallel")
        if self.size == 1:
            if able:
                network.sequence_parallel = None
            return
        if not able:
            raise ValueError(f"a {type(network).__name__} cannot share its tokens among processes")
        _check_heads(network.config.n_heads, _size(self.ulysses), "the network")
        network.sequence_parallel = self

    @property
    def size(self) -> int:
        """Ranks that share a sequence, U R."""
        return _size(self.ring) * _size(self.ulysses)

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return _rank(self.ring) * _size(self.ulysses) + _rank(self.ulysses)

    @_uncompiled
    def shard(self, x: Tensor, dim: int) -> Tensor:
        """The rank's C = ceil(L / (U R)) of the L tokens along `dim`; zeros behind the last token.

        x is the same on every rank. The gradient is that of the whole x.
        """
        return _Shard.apply(x, dim % x.ndim, self)

    @_uncompiled
    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All `length` tokens along `dim` from the C of each rank: `shard` undone.

        Raises:
            ValueError: no `length` tokens are spread like this.
        """
        dim = dim % x.ndim
        if x.shape[dim] != self._chunk(length):
            raise ValueError(
                f"{length} tokens on {self.size} ranks are {self._chunk(length)} on each, "
                f"got {x.shape[dim]}"
            )
        return _Gather.apply(x, dim, length, self)

    def key_mask(self, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """The rank's part (B, C) of a key mask (B, L) for tokens `like` (B, L, ...).

        It is False on the padding; None, if there is neither padding nor a mask.
        """
        if mask is None and like.shape[1] % self.size:
            mask = like.new_ones(like.shape[:2], dtype=torch.bool)
        return None if mask is None else self.shard(mask, 1)

    @_uncompiled
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, *,
        text_k: Tensor | None = None, text_v: Tensor | None = None, text_mask: Tensor | None = None,
        text_gate: Tensor | None = None, bias: Tensor | None = None, pool: Pool | None = None,
        backend: str | None = None,
    ) -> Tensor:  # fmt: skip
        """`lumina_kernels.gqa_attention` of the rank's queries to the keys of all ranks.

        With U > 1 the ranks exchange tokens for heads. A rank has H / U query heads then, and the
        key/value heads that these read: G may be less than U, or no multiple of it. With R > 1,

            out = sum over the chunks i of exp(lse_i - lse) out_i,  lse = log(sum of exp(lse_i)),

        in float32, and the text's term is added to the sum. Every optional argument is None on all
        ranks or on none.

        Args:
            q: the rank's queries, (B, C, H, K).
            k, v: the rank's keys and values, (B, C, G, K), same dtype; G divides H.
            key_mask: which of the rank's keys count, (B, C) bool, any pattern.
            text_k, text_v: keys and values of the text, (B, T, G, K), the same on all ranks.
            text_mask: (B, T) bool, the same on all ranks; or the rank's rows (B, C, T).
            text_gate: (H,), the same on all ranks.
            bias: added to the scores of the rank's keys, broadcastable to (B, 1, 1, C).
            pool: makes k, v, mask and bias of the keys and values of all tokens, for example means
                over windows (context drop), in place of key_mask and bias. It gets the padding too:
                (B, U R C, G', K) with some of the heads. With R > 1 keys and values are gathered
                for it, and each rank has all those of its heads.
            backend: None takes the best one available; see `lumina_kernels.backend`.

        Returns:
            (B, C, H, K) in q.dtype.

        Raises:
            ValueError, TypeError: U does not divide H; a shape or dtype is not as above.
        """
        self._check(q, k, v, key_mask, bias)
        text = {"text_k": text_k, "text_v": text_v, "text_mask": text_mask, "text_gate": text_gate}
        if bias is not None:
            bias = bias.expand(q.shape[0], 1, 1, q.shape[1])
        if self.ulysses is not None:
            q, k, v, text = self._to_heads(q, k, v, text)
            if key_mask is not None:
                key_mask = all_gather(key_mask, 1, self.ulysses)
            if bias is not None:
                bias = gathered(bias, 3, self.ulysses)
        ring = self.ring
        if pool is not None:
            if ring is not None:
                k, v = gathered(torch.cat([k, v], 2), 1, ring).chunk(2, 2)
            k, v, key_mask, bias = pool(k, v)
            ring = None
        if ring is None:
            out = gqa_attention(q, k, v, key_mask, bias=bias, **text, backend=backend)
        else:
            out = ring_attention(q, k, v, key_mask, bias, ring, backend)
            if text_k is not None:
                out = out + gqa_attention(q, k[:, :0], v[:, :0], **text, backend=backend)
            out = out.to(q.dtype)
        return out if self.ulysses is None else _to_tokens(out, self.ulysses)

    def _to_heads(self, q, k, v, text):
        """All tokens of the group, of the rank's query heads and of the key/value heads they read.

        One exchange for q, k and v: a rank is sent its heads of all three.
        """
        group, U = self.ulysses, self.ulysses.size()
        index = _kv_heads(q.shape[2], k.shape[2], U, q.device)

        def by_rank(x):  # (B, tokens, U, heads, K)
            return (x if len(index) == x.shape[2] else x.index_select(2, index)).unflatten(
                2, (U, -1)
            )

        each = q.unflatten(2, (U, -1)), by_rank(k), by_rank(v)
        x = torch.cat([z.movedim(2, 0) for z in each], 3)
        x = all_to_all(x, group)  # (U, B, C, heads, K), the first dimension from heads to tokens
        q, k, v = x.movedim(0, 1).flatten(1, 2).split([z.shape[3] for z in each], 2)
        if text["text_k"] is not None:
            rank = group.rank()
            text_k, text_v = (by_rank(text[name])[:, :, rank] for name in ("text_k", "text_v"))
            gate = text["text_gate"].unflatten(0, (U, -1))[rank]
            text = {**text, "text_k": text_k, "text_v": text_v, "text_gate": gate}
        if text["text_mask"] is not None and text["text_mask"].ndim == 3:
            text = {**text, "text_mask": all_gather(text["text_mask"], 1, group)}
        return q, k, v, text

    def _chunk(self, length: int) -> int:
        return -(-length // self.size)

    def _check(self, q, k, v, key_mask, bias) -> None:
        check_axes("q", q, "B, C, H, K")
        check_axes("k", k, "B, C, G, K")
        (B, C, H, K), G, U, device = q.shape, k.shape[2], _size(self.ulysses), q.device
        for name, x in (("k", k), ("v", v)):
            check_shape(name, x, device, (B, C, G, K))
        check_same_dtype(q=q, k=k, v=v)
        if G == 0 or H % G:
            raise ValueError(f"k must have a number of heads that divides the {H} of q, got {G}")
        _check_heads(H, U, "q")
        check_mask("key_mask", key_mask, device, (B, C))
        if bias is not None:
            check_shape("bias", bias, device, (B, 1, 1, C), (1, 1, 1, C))


def _check_heads(H: int, U: int, of: str) -> None:
    if H % U:
        raise ValueError(f"the {U} ranks of a Ulysses group must divide the heads of {of}, got {H}")


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def _kv_heads(H: int, G: int, U: int, device) -> Tensor:
    """The key/value heads that the query heads of U ranks read, those of the first rank first.

    Grouped attention takes key/value heads of equally many query heads each. So a head comes once
    for each `together` of its query heads: a group ends every H / G of them, and a rank's query
    heads every H / U.
    """
    together = math.gcd(H // G, H // U)
    return torch.arange(0, H, together, device=device) // (H // G)


def _to_tokens(out: Tensor, group: ProcessGroup) -> Tensor:
    """(B, C, H, K), the rank's tokens of all heads, from all tokens of its heads."""
    out = out.unflatten(1, (group.size(), -1)).movedim(1, 0)  # (U, B, C, H / U, K)
    return all_to_all(out, group).movedim(0, 2).flatten(2, 3)


def _part(x: Tensor, dim: int, parallel: SequenceParallel) -> Tensor:
    """A copy of the rank's tokens, so that the others are freed; zeros behind the last one."""
    C, L = parallel._chunk(x.shape[dim]), x.shape[dim]
    first, end = (min(L, place * C) for place in (parallel.rank, parallel.rank + 1))
    own = x.narrow(dim, first, end - first)
    beyond = [0] * (2 * (x.ndim - 1 - dim)) + [0, C - own.shape[dim]]
    return F.pad(own, beyond) if end - first < C else own.clone()


def _whole(x: Tensor, dim: int, length: int, parallel: SequenceParallel) -> Tensor:
    for group in (parallel.ulysses, parallel.ring):
        x = x if group is None else all_gather(x, dim, group)
    return x.narrow(dim, 0, length)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, parallel):
        ctx.rest = dim, x.shape[dim], parallel
        return _part(x, dim, parallel)

    @staticmethod
    def backward(ctx, dout):
        return _whole(dout / ctx.rest[-1].size, *ctx.rest), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, length, parallel):
        ctx.rest = dim, parallel
        return _whole(x, dim, length, parallel)

    @staticmethod
    def backward(ctx, dout):
        return _part(dout * ctx.rest[-1].size, *ctx.rest), None, None, None
