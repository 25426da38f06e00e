"""What a rank sends, keeps and computes when `lumina.distributed` spreads a Next-DiT: counted, not
timed. tests/distributed/test_scale.py compares it with what runs send and keep.

B pictures of a rank, C tokens of a rank, H query heads, G key/value heads, K head_dim, F width of
the FFN; U ranks of a Ulysses group, R ranks of a ring; `e` bytes of a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch

from lumina import NextDiT, NextDiTConfig
from lumina.models.flops import forward_flops


@dataclass(frozen=True)
class Work:
    """What a step has to do.

    Args:
        name: for tables.
        config, size: of the network, and of a latent without batch and channels.
        text: tokens of a caption.
        pictures: of a step; of sampling one evaluation, which guidance doubles.
        e: bytes of an activation.
    """

    name: str
    config: NextDiTConfig
    size: tuple[int, ...]
    text: int = 256
    pictures: int = 1
    e: int = 2

    @cached_property
    def tokens(self) -> int:
        return math.prod(self.size) // self.config.patch_volume

    @property
    def kv(self) -> int:
        return self.config.n_kv_heads * self.config.head_dim

    @property
    def flops(self) -> int:
        """Of a forward of one picture."""
        return flops(self.config, self.size, self.text)

    @property
    def text_flops(self) -> int:
        """Of a layer: keys and values of the text, which every rank makes; sampling makes them
        once for all its steps."""
        return 4 * self.text * self.config.cap_feat_dim * self.kv

    def attention_flops(self, queries: float, keys: float) -> float:
        """Of a layer: two products of all heads."""
        return 4.0 * queries * keys * self.config.dim

    @cached_property
    def token_flops(self) -> float:
        """Of a layer and token, the rest: its matrix products, with a share of those before and
        behind the blocks."""
        attention = self.attention_flops(self.tokens, self.tokens + self.text)
        layers = self.config.n_layers
        return (self.flops / layers - attention - self.text_flops) / self.tokens

    @cached_property
    def token_bytes(self) -> int:
        """Of a layer and token: what the fused ops outside attention read and write: two
        sandwich_norm_chain, qk_norm_rope3d, swiglu."""
        D, F = self.config.dim, self.config.ffn_dim
        return self.e * (2 * 4 * D + 2 * (D + self.kv) + 3 * F)


@cache
def flops(config: NextDiTConfig, size: tuple[int, ...], text: int) -> int:
    """As `forward_flops`, from networks of one and of two layers: counting 32 takes seconds."""
    one, two = (forward_flops(replace(config, n_layers=n), size, text) for n in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


@dataclass(frozen=True)
class Plan:
    """Ranks along the dimensions of a mesh, ("data", "guidance", "ring", "ulysses").

    Args:
        shards: ranks that share parameters, gradients and the optimiser's state: all of them is
            FSDP, fewer is HSDP, 1 is none.
        checkpoint: keep the inputs of the blocks alone.
        accumulate: parts in which a rank takes its pictures, one after the other.
    """

    data: int = 1
    guidance: int = 1
    ring: int = 1
    ulysses: int = 1
    shards: int = 1
    checkpoint: bool = False
    accumulate: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.guidance * self.sequence

    @property
    def sequence(self) -> int:
        return self.ring * self.ulysses

    def tokens(self, work: Work) -> int:
        """Of a rank."""
        return -(-work.tokens // self.sequence)

    def kv_heads(self, config: NextDiTConfig) -> int:
        """Of a rank inside attention: a head once for each rank that reads it."""
        here = config.n_heads // self.ulysses
        return here // math.gcd(config.n_heads // config.n_kv_heads, here)


@dataclass(frozen=True)
class Exchange:
    """One of the exchanges of a step, as often as it happens.

    Args:
        what: name of the parallelism.
        kind: "all_to_all", "send", "all_gather", "reduce_scatter" or "all_reduce".
        group, stride: ranks that take part, and from one of them to the next.
        bytes: that each sends, once.
        times: in the step.
    """

    what: str
    kind: str
    group: int
    stride: int
    bytes: float
    times: float = 1

    @property
    def sent(self) -> float:
        return self.bytes * self.times


Shapes = tuple[torch.Size, ...]


@cache
def parameters(config: NextDiTConfig) -> tuple[Shapes, Shapes]:
    """Shapes of the parameters of a block, and of those outside all blocks."""
    with torch.device("meta"):
        named = [(name, p.shape) for name, p in NextDiT(config).named_parameters()]
    block = tuple(shape for name, shape in named if name.startswith("layers.0."))
    return block, tuple(shape for name, shape in named if not name.startswith("layers."))


@cache
def shard_of(shapes: Shapes, shards: int) -> int:
    """Numbers on a rank: FSDP2 cuts the first dimension, and pads it to a multiple."""
    return sum(-(-shape[0] // shards) * math.prod(shape[1:]) for shape in shapes)


def attention_exchanges(work: Work, plan: Plan, B: int, backward: bool) -> Iterator[Exchange]:
    """Of one layer."""
    config, C, U, R, e = work.config, plan.tokens(work), plan.ulysses, plan.ring, work.e
    K, heads, G = config.head_dim, config.n_heads // U, plan.kv_heads(config)
    padded = work.tokens % plan.sequence > 0  # there is a mask, of a byte each
    if U > 1:  # q, k, v to heads, and the result to tokens; its backward is the transpose
        for numbers in (heads + 2 * G, heads):
            yield Exchange("ulysses", "all_to_all", U, 1, (U - 1) * B * C * numbers * K * e)
        if padded and not backward:
            yield Exchange("ulysses", "all_gather", U, 1, (U - 1) * B * C)
    if R > 1:
        keys = 2 * B * C * U * G * K
        mask = B * C * U if padded else 0
        yield Exchange("ring", "send", R, U, keys * e + mask, R - 1)
        if backward:  # the gradients of k and v, in float32, come home with the last one
            yield Exchange("ring", "send", R, U, keys * 4, R)


def outer_exchanges(work: Work, plan: Plan, B: int) -> Iterator[Exchange]:
    """Behind the last layer: the output of all tokens, of which the loss or the solver needs all;
    guidance's two velocities."""
    config, C, U, R = work.config, plan.tokens(work), plan.ulysses, plan.ring
    numbers = B * C * config.patch_volume * config.out_channels * work.e
    if U > 1:
        yield Exchange("ulysses", "all_gather", U, 1, (U - 1) * numbers)
    if R > 1:
        yield Exchange("ring", "all_gather", R, U, (R - 1) * U * numbers)
    if plan.guidance > 1:
        latents = B * config.in_channels * math.prod(work.size) * work.e
        yield Exchange("guidance", "all_gather", 2, plan.sequence, latents)


def shard_exchanges(
    shapes: Shapes, plan: Plan, e: int, times: int
) -> tuple[list[Exchange], list[Exchange]]:
    """Of a block, or of what is outside: the gathers of parameters, `times` in a step, and what
    becomes of gradients."""
    n, copies, shard = plan.shards, plan.ranks // plan.shards, shard_of(shapes, plan.shards)
    gathers, reductions = [], []
    if n > 1:
        gathers.append(Exchange("shards", "all_gather", n, 1, (n - 1) * shard * e, times))
        reductions.append(Exchange("shards", "reduce_scatter", n, 1, (n - 1) * shard * 4))
    if copies > 1:
        numbers = 2 * (copies - 1) / copies * shard * 4
        reductions.append(Exchange("copies", "all_reduce", copies, n, numbers))
    return gathers, reductions


def exchanges(work: Work, plan: Plan, training: bool) -> list[Exchange]:
    """Of a forward; in training of forwards and backwards of a step, without the few numbers of
    the clipped norm and of the loss."""
    layers, parts = work.config.n_layers, plan.accumulate
    B = batch(work, plan, training)
    found = [
        (x, layers * parts * (2 if training and plan.checkpoint else 1))
        for x in attention_exchanges(work, plan, B, False)
    ]
    found += [(x, parts) for x in outer_exchanges(work, plan, B)]
    block, rest = parameters(work.config)
    if training:
        found += [(x, layers * parts) for x in attention_exchanges(work, plan, B, True)]
    if training and plan.ranks > 1:
        sharded = parts if plan.shards > 1 else 1  # else one exchange behind all parts
        for shapes, times, count in ((block, 2, layers), (rest, 1, 1)):
            gathers, reductions = shard_exchanges(shapes, plan, work.e, times)
            found += [(x, count * sharded) for x in gathers + reductions]
    return [Exchange(x.what, x.kind, x.group, x.stride, x.bytes, x.times * n) for x, n in found]


def batch(work: Work, plan: Plan, training: bool) -> int:
    """Pictures that a rank's network takes at once; guidance makes two of one."""
    own = -(-work.pictures // (plan.data * plan.accumulate))
    return own if training else own * 2 // plan.guidance


def state_bytes(work: Work, plan: Plan) -> int:
    """Parameters, gradients, AdamW's two moments and the moving average, in float32."""
    block, rest = parameters(work.config)
    n = plan.shards
    return 20 * (work.config.n_layers * shard_of(block, n) + shard_of(rest, n))


def kept_by_a_token(work: Work, plan: Plan) -> int:
    """Bytes of a token of one layer that autograd keeps for the backward.

    Of width D: h, the sub-layers' inputs and outputs, and attention's q before and behind the
    rotation and its result; in 16 bits also what rounding took from the result, a byte each.
    Ulysses keeps the result in both layouts; a ring the merged one in float32 and the text's.
    """
    config, e, low = work.config, work.e, work.e < 4
    D, H, here = config.dim, config.n_heads, plan.kv_heads(config) * config.head_dim
    here *= plan.ulysses  # for a token of the rank
    numbers = 9 * D + work.kv + 2 * here + 3 * config.ffn_dim
    # A number of each of four norms, two of each head and softmax.
    others = 4 * (4 + 2 * 2 * H) + (D if low else 0)
    if plan.ring > 1:
        return e * (numbers + D) + 4 * D + 4 * H + others
    return e * (numbers + (D if plan.ulysses > 1 else 0)) + others


def activation_bytes(work: Work, plan: Plan) -> int:
    """What the blocks keep between forward and backward, but for what belongs to the text and to
    the picture as a whole. With checkpoints, the two tensors of each block's carry."""
    tokens = work.config.n_layers * batch(work, plan, True) * plan.tokens(work)
    return tokens * (
        2 * work.config.dim * work.e if plan.checkpoint else kept_by_a_token(work, plan)
    )


def working_bytes(work: Work, plan: Plan, training: bool) -> int:
    """What is alive for a while: the FFN's hidden layers and seven tensors of width D; on a ring
    the keys that arrive and three gradients of keys; what a block keeps that is computed again; the
    parameters that are gathered, of two blocks, and one block's gradients in both dtypes."""
    config, e = work.config, work.e
    tokens = batch(work, plan, training) * plan.tokens(work)
    here = plan.kv_heads(config) * config.head_dim * plan.ulysses
    found = tokens * e * (3 * config.ffn_dim + 7 * config.dim)
    if plan.ring > 1:
        found += tokens * 2 * here * (e + (3 * 4 if training else 0))
    if not training:
        return found
    if plan.checkpoint:
        found += tokens * kept_by_a_token(work, plan)
    block, rest = (shard_of(shapes, 1) for shapes in parameters(config))
    if plan.shards > 1:
        return found + block * (2 * e + e + 4) + rest * e
    # Copies for the products in 16 bits; the gradients in a row, and their mean.
    whole = config.n_layers * block + rest
    return max(found, 8 * whole if plan.ranks > 1 else 0) + (e * whole if e < 4 else 0)


def memory(work: Work, plan: Plan, training: bool) -> int:
    """Bytes of a rank."""
    working = working_bytes(work, plan, training)
    if training:
        return state_bytes(work, plan) + activation_bytes(work, plan) + working
    block, rest = (shard_of(shapes, 1) for shapes in parameters(work.config))
    texts = 4 * work.text * work.kv * batch(work, plan, False)  # keys and values, of each layer
    return work.e * (work.config.n_layers * (block + texts // 2) + rest) + working
