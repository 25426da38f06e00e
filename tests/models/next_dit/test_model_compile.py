"""lumina.NextDiT under torch.compile: no graph break, and one graph for many sizes."""

import pytest
import torch
from common import DEVICE, assert_compiles, compiled
from networks import cast, inputs, pair

from lumina import ContextDrop, RopeScaling

# Sides of at least two tokens (torch.compile takes 1 for a constant), and no two alike or equal to
# a width of the network: torch.compile takes those for one symbol.
SIZES = {
    "one size": ((3, 8, 12), (3, 20, 16), (3, 12, 28), (3, 16, 16)),
    "with a remainder": ((3, 6, 10), (3, 14, 6), (3, 10, 12), (3, 10, 10)),
    "lists": (
        ((3, 20, 28), (3, 8, 12), (3, 16, 22)),
        ((3, 22, 36), (3, 10, 14), (3, 16, 28)),
        ((3, 32, 28), (3, 8, 10), (3, 12, 18)),
    ),
}
SCALING = RopeScaling("time_aware", base_size=2)
SETTINGS = {
    "plain": {},
    "drop": dict(context_drop=ContextDrop().at(0.0, 1)),
    "all": dict(
        base_seqlen=5, rope_scaling=SCALING, context_drop=ContextDrop(log_count=False).at(0.5, 1)
    ),
}


def assert_same(outs, expected):
    outs, expected = (z if isinstance(z, list) else [z] for z in (outs, expected))
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@pytest.mark.parametrize(
    "sizes, settings",
    [("one size", "plain"), ("one size", "all"), ("with a remainder", "drop"), ("lists", "all")],
)
def test_one_graph_serves_many_sizes(sizes, settings):
    ours, graphs = pair(dim=48, multiple_of=64, n_layers=1)[0].float(), []
    fast = compiled(ours, graphs)
    for size in SIZES[sizes]:
        arguments = cast(inputs(*size), torch.float32)
        with torch.no_grad():
            assert_same(
                fast(*arguments, **SETTINGS[settings]), ours(*arguments, **SETTINGS[settings])
            )
    assert len(graphs) == 1


def test_a_run_with_context_drop_is_one_graph_for_each_set_of_layers():
    """`tests/sampling/test_layers_of_context_drop.py` checks that there are few sets; torch.compile
    gives up after eight."""
    ours, graphs = pair(dim=8, multiple_of=8)[0].float(), []
    fast = compiled(ours, graphs)
    x, _, *rest = cast(inputs(3, 8, 12), torch.float32)
    for i in range(21):
        drop = ContextDrop().at(i / 20, 2)
        t = torch.full((3,), i / 20, device=DEVICE)
        with torch.no_grad():
            assert_same(fast(x, t, *rest, context_drop=drop), ours(x, t, *rest, context_drop=drop))
    assert len(graphs) == 3  # both layers, the first, none


@pytest.mark.parametrize("kind", [None, "watershed", "drop"])
def test_gradients(kind):
    ours = pair(dim=48)[0].float()
    settings = {
        "watershed": dict(rope_scaling=RopeScaling("watershed", base_size=2), base_seqlen=7),
        "drop": dict(context_drop=ContextDrop().at(0.0, 2)),
    }.get(kind, {})

    def step(x, t, feats, mask):
        return ours(x, t, feats, mask, **settings)

    two = (cast(inputs(*size), torch.float32) for size in ((3, 8, 6), (3, 12, 10)))
    names = ("x", "t", "feats", "mask")
    assert_compiles(step, *(dict(zip(names, arguments, strict=True)) for arguments in two))
