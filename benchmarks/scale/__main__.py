"""Predicts step time and memory on 1 to 512 H100: python -m benchmarks.scale

Nothing is measured here, and no GPU is needed. docs/scaling.md has these tables and says what they
rest on; `python -m benchmarks.scale.check` compares the model with runs of two processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

from benchmarks.scale.cluster import GPU, Cluster, h100
from benchmarks.scale.plan import Plan, Work, memory
from benchmarks.scale.steps import seconds
from lumina import NextDiTConfig
from lumina.models.next_dit.config import PRESETS

RANKS = [2**i for i in range(10)]
FULL = 0.9  # of the memory; the rest is for the allocator, NCCL and CUDA

VIDEO = NextDiTConfig(dim=3072, n_layers=32, n_kv_heads=32, cap_feat_dim=4096, axes=("t", "h", "w"))
# Pictures of a training step: Lumina-Next's batch of 256 at 1K, and fewer of more tokens.
WORKS = {
    Work("2B, 1K picture, 4096 tokens", PRESETS["2b-gqa"], (128, 128)): 256,
    Work("2B, 2K picture, 16384 tokens", PRESETS["2b-gqa"], (256, 256)): 128,
    Work("5B, video, 131072 tokens", VIDEO, (128, 64, 64)): 32,
}

Plans = Callable[[int, Work], Iterator[Plan]]


def powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def sequences(ranks: int, work: Work) -> Iterator[tuple[int, int]]:
    """Ring and Ulysses that together are so many ranks."""
    for ulysses in powers(ranks):
        if work.config.n_heads % ulysses == 0:
            yield ranks // ulysses, ulysses


def guided(ranks: int, work: Work) -> Iterator[Plan]:
    if ranks == 2:
        yield Plan(guidance=2)


def by_ulysses(ranks: int, work: Work) -> Iterator[Plan]:
    yield from (Plan(ulysses=u) for r, u in sequences(ranks, work) if r == 1)


def by_ring(ranks: int, work: Work) -> Iterator[Plan]:
    if ranks > 1:
        yield Plan(ring=ranks)


def any_sampling(ranks: int, work: Work) -> Iterator[Plan]:
    for guidance in powers(min(2, ranks)):
        for ring, ulysses in sequences(ranks // guidance, work):
            yield Plan(1, guidance, ring, ulysses)


def sharded(shards: Sequence[int | None], share: Callable[[int, int], bool]) -> Plans:
    """Plans of training. shards: numbers of ranks, of which none is all; share: whether ring and
    Ulysses of these sizes may be."""

    def plans(ranks: int, work: Work) -> Iterator[Plan]:
        each = [n or ranks for n in shards if n is None or n == 1 or n < ranks]
        for data in powers(min(ranks, work.pictures)):
            for ring, ulysses in sequences(ranks // data, work):
                if share(ring, ulysses):
                    parts = powers(work.pictures // data)
                    for n, checkpoint, of in product(each, (False, True), parts):
                        yield Plan(data, 1, ring, ulysses, n, checkpoint, of)

    return plans


def alone(ring: int, ulysses: int) -> bool:
    return ring == ulysses == 1


SAMPLING: dict[str, Plans] = {
    "guidance": guided, "Ulysses": by_ulysses, "ring": by_ring, "the fastest": any_sampling,
}  # fmt: skip
TRAINING: dict[str, Plans] = {
    "data": sharded([1], alone),
    "FSDP": sharded([None], alone),
    "FSDP, Ulysses": sharded([None], lambda r, u: r == 1 < u),
    "FSDP, ring": sharded([None], lambda r, u: u == 1 < r),
    "HSDP": sharded([8, 64], lambda r, u: r == 1),
    "the fastest without HSDP": sharded([1, None], lambda r, u: True),
}


def fastest(
    plans: Iterator[Plan], work: Work, cluster: Cluster, training: bool
) -> tuple[Plan, float] | None:
    """Of those that fit into memory; of equally fast ones the first."""
    room = FULL * cluster.memory
    fitting = (plan for plan in plans if memory(work, plan, training) <= room)
    found = ((plan, seconds(work, plan, cluster, training)) for plan in fitting)
    return min(found, key=lambda x: x[1], default=None)


def name_of(plan: Plan) -> str:
    """What the plan is, in short: d4 g2 r2 u8, then c for checkpoints, /4 for four parts, and s8
    where 8 ranks, neither one nor all, share the state."""
    parts = [("d", plan.data), ("g", plan.guidance), ("r", plan.ring), ("u", plan.ulysses)]
    name = " ".join(f"{letter}{n}" for letter, n in parts if n > 1)
    name += " c" * plan.checkpoint + f" /{plan.accumulate}" * (plan.accumulate > 1)
    name += f" s{plan.shards}" * (1 < plan.shards < plan.ranks)
    return name.strip() or "1"


def shown(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def cell(found: tuple[Plan, float] | None, unit: float, names: bool) -> str:
    if found is None:
        return ""
    plan, time = found
    return shown(time * unit) + f" ({name_of(plan)})" * names


def table(work: Work, columns: dict[str, Plans], cluster: Cluster, training: bool) -> Iterator[str]:
    """Markdown. Sampling in milliseconds, training in seconds; memory and the share of the peak
    FLOPs are those of the last column."""
    unit = 1 if training else 1e3
    yield f"| GPUs | {' | '.join(columns)} | GB a GPU | of peak |"
    yield "|---" * (len(columns) + 3) + "|"
    flops = work.pictures * work.flops * (3 if training else 2)
    for ranks in RANKS:
        each = [fastest(plans(ranks, work), work, cluster, training) for plans in columns.values()]
        cells = [cell(x, unit, training or i + 1 == len(each)) for i, x in enumerate(each)]
        if each[-1]:
            plan, time = each[-1]
            share = flops / (ranks * time * GPU.tensor_rate)
            cells += [f"{memory(work, plan, training) / 1e9:.1f}", f"{share:.0%}"]
        else:
            cells += ["", ""]
        yield f"| {ranks} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scale")
    parser.add_argument(
        "--links", type=float, default=1.0, help="share of the assumed rates that links reach"
    )
    share = parser.parse_args(arguments).links
    for work, pictures in WORKS.items():
        cluster = h100(work.config.head_dim)
        links = {"inside": share * cluster.inside, "outside": share * cluster.outside}
        cluster = replace(cluster, **links)
        print(f"### {work.name}\n")
        print("Sampling, milliseconds of one evaluation of one guided picture, predicted:\n")
        print("\n".join(table(work, SAMPLING, cluster, False)))
        print(f"\nTraining, seconds of a step of {pictures} pictures, predicted:\n")
        print("\n".join(table(replace(work, pictures=pictures), TRAINING, cluster, True)) + "\n")


if __name__ == "__main__":
    main()
