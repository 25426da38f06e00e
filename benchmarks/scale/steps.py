"""The time of a step: what a rank computes and sends, and which of it goes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.cluster import Cluster
from benchmarks.scale.plan import (
    Plan,
    Work,
    attention_exchanges,
    batch,
    memory,
    outer_exchanges,
    parameters,
    shard_exchanges,
    shard_of,
)


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and the bytes of a rank's memory.

    Args:
        seconds: of all.
        computing: what the processor alone would take, and Python where it is slower.
        memory: bytes.
    """

    seconds: float
    computing: float
    memory: int


def _layer(work: Work, plan: Plan, cluster: Cluster, B: int, training: bool, backward: bool):
    """Seconds of a layer on a rank: all but what shards send, and the computing alone."""
    C, R, U, D, e = plan.tokens(work), plan.ring, plan.ulysses, work.config.dim, work.e
    times = 2 if backward else 1  # a product has two in its backward
    text = work.text_flops if training else 0
    products = times * B * (C * work.token_flops + text) / cluster.matrix
    passes = times * B * C * work.token_bytes / cluster.copy
    attention = B * work.attention_flops(C, work.tokens) / cluster.attention
    behind = B * work.attention_flops(C, work.text) / cluster.attention
    each = list(attention_exchanges(work, plan, B, backward))
    ring = [cluster.seconds(x) for x in each if x.what == "ring"]
    ulysses = [cluster.seconds(x) for x in each if x.what == "ulysses"]
    if U > 1:  # put together and taken apart on both sides
        here = plan.kv_heads(work.config) * work.config.head_dim * U
        passes += B * C * e * (4 * (D + 2 * here) + 4 * D) / cluster.copy
    if backward:
        # On a ring the forward of each part is computed again.
        attention *= cluster.backward + (1 if R > 1 else 0)
        behind *= cluster.backward
    if R > 1:  # the merge, in float32
        passes += (R - 1) * B * C * D * (e + 2 * 4) / cluster.copy
        hop, keys, grads = attention / R, ring[0], ring[1] if backward else 0.0
        if cluster.overlaps:
            waiting = (R - 1) * max(0.0, keys + grads - hop) + grads
        else:
            waiting = (R - 1) * keys + R * grads
    else:
        waiting = 0.0
    launches = (2 * cluster.launches if backward else cluster.launches) + 8 * (R - 1)
    calls = len(ulysses) + (R - 1) * (2 if backward else 1)
    device = products + passes + attention + behind + launches * cluster.launch
    host = (cluster.host[0] + calls * cluster.host[1]) * (1.5 if training else 1)
    return max(device + sum(ulysses) + waiting, host), max(device, host)


def step(work: Work, plan: Plan, cluster: Cluster, training: bool) -> Step:
    """An evaluation of the network for guided pictures; or a step of training with AdamW."""
    B, layers = batch(work, plan, training), work.config.n_layers
    forward, computing = _layer(work, plan, cluster, B, training, False)
    outside = sum(cluster.seconds(x) for x in outer_exchanges(work, plan, B))
    if not training:
        total = layers * forward + outside
        return Step(total, layers * computing, memory(work, plan, False))
    back, back_computing = _layer(work, plan, cluster, B, True, True)
    again = forward if plan.checkpoint else 0.0
    computed = computing * (2 if plan.checkpoint else 1) + back_computing
    block, rest = parameters(work.config)
    shard = layers * shard_of(block, plan.shards) + shard_of(rest, plan.shards)
    # The clipped norm and gradient, AdamW, the average; before the next step.
    update = 52 * shard / cluster.copy
    gathers, reductions = shard_exchanges(block, plan, work.e, 1)
    gather, reduce = (sum(map(cluster.seconds, x)) for x in (gathers, reductions))
    if plan.shards > 1:
        edge = gather + reduce  # the first and the last have nothing to hide behind
        for x in (z for found in shard_exchanges(rest, plan, work.e, 1) for z in found):
            edge += cluster.seconds(x)
        if cluster.overlaps:
            each = max(forward, gather) + max(again + back, gather + reduce)
        else:
            each = forward + again + back + 2 * gather + reduce
            edge -= gather + reduce
        total = plan.accumulate * (layers * each + outside + edge)
    else:
        total = plan.accumulate * (layers * (forward + again + back) + outside)
        if plan.ranks > 1:  # one exchange of all gradients, behind the backward
            whole = shard_exchanges(block * layers + rest, plan, work.e, 1)[1]
            total += sum(map(cluster.seconds, whole)) + 16 * shard / cluster.copy
    computed = plan.accumulate * layers * computed + update
    return Step(total + update, computed, memory(work, plan, True))
