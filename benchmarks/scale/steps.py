"""The time of a step: what a rank computes and sends, and which of it goes on at once."""

from __future__ import annotations

from benchmarks.scale.cluster import Cluster
from benchmarks.scale.plan import (
    Plan,
    Work,
    attention_exchanges,
    batch,
    outer_exchanges,
    parameters,
    shard_exchanges,
    shard_of,
)

# A number of a parameter: read and written by the clipped norm (read), the clipping of the
# gradient, AdamW (parameter, gradient, two moments) and the average, in float32.
UPDATE = 4 * (1 + 2 + 7 + 3)


def seconds(work: Work, plan: Plan, cluster: Cluster, training: bool) -> float:
    """Of an evaluation of the network for guided pictures; or of a step of training, with AdamW."""
    B, layers = batch(work, plan, training), work.config.n_layers
    forward = layer_seconds(work, plan, cluster, B, training, False)
    outside = sum(cluster.seconds(x) for x in outer_exchanges(work, plan, B))
    if not training:
        return layers * forward + outside
    backward = layer_seconds(work, plan, cluster, B, True, True)
    if plan.checkpoint:
        backward += forward
    block, rest = parameters(work.config)
    own = layers * shard_of(block, plan.shards) + shard_of(rest, plan.shards)
    update = UPDATE * own / cluster.copy
    if plan.shards == 1:
        total = plan.accumulate * (layers * (forward + backward) + outside) + update
        if plan.ranks > 1:  # one exchange of all gradients, which it puts in a row and takes apart
            reductions = shard_exchanges(block * layers + rest, plan, work.e, 1)[1]
            total += sum(map(cluster.seconds, reductions)) + 16 * own / cluster.copy
        return total
    gather, reduce = (sum(map(cluster.seconds, x)) for x in shard_exchanges(block, plan, work.e, 1))
    ends = sum(cluster.seconds(x) for z in shard_exchanges(rest, plan, work.e, 1) for x in z)
    # FSDP copies what it gathered into parameters, twice, and gradients into what it sends.
    copied = plan.shards * shard_of(block, plan.shards) * (2 * 2 * work.e + work.e + 4)
    backward += copied / cluster.copy
    if cluster.overlaps:  # but for the first gather and the last reduction
        layer = max(forward, gather) + max(backward, gather + reduce)
        ends += gather + reduce
    else:
        layer = forward + backward + 2 * gather + reduce
    return plan.accumulate * (layers * layer + outside + ends) + update


def layer_seconds(
    work: Work, plan: Plan, cluster: Cluster, B: int, training: bool, backward: bool
) -> float:
    """Of the forward or the backward of a layer, without what shards send."""
    C, R, D, e = plan.tokens(work), plan.ring, work.config.dim, work.e
    each = list(attention_exchanges(work, plan, B, backward))
    ring = [cluster.seconds(x) for x in each if x.what == "ring"]
    ulysses = [cluster.seconds(x) for x in each if x.what == "ulysses"]
    times = 2 if backward else 1  # a product has two in its backward
    numbers = times * C * work.token_flops + (times * work.text_flops if training else 0)
    products = B * numbers / cluster.matrix
    passes = times * B * C * work.token_bytes
    attention = B * work.attention_flops(C, work.tokens) / cluster.attention
    behind = B * work.attention_flops(C, work.text) / cluster.attention
    if backward:  # on a ring the forward of each part is computed again
        attention *= cluster.backward + (1 if R > 1 else 0)
        behind *= cluster.backward
    if ulysses:  # q, k, v and the result are put in order before and behind the exchanges
        here = plan.kv_heads(work.config) * work.config.head_dim * plan.ulysses
        passes += B * C * e * (4 * (D + 2 * here) + 4 * D)
    waiting = 0.0
    if R > 1:
        passes += (R - 1) * B * C * D * (e + 2 * 4)  # the merge, in float32
        keys, grads = ring[0], ring[1] if backward else 0.0
        hidden = attention / R if cluster.overlaps else 0.0
        waiting = (R - 1) * max(0.0, keys + grads - hidden) + grads
    # A part of the keys has its attention and its merge.
    launches = times * cluster.launches + 8 * (R - 1)
    device = products + passes / cluster.copy + attention + behind + launches * cluster.launch
    calls = len(ulysses) + (R - 1) * times
    host = (cluster.host[0] + calls * cluster.host[1]) * (1.5 if training else 1)
    return max(device + sum(ulysses) + waiting, host)
