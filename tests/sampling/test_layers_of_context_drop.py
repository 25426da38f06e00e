"""Context drop: which layers pool at which time, and what a pooled layer computes."""

import functools

import pytest
import torch
from common import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AUDIO, IMAGE, VIDEO, config, inputs, pair, randn
from sampling_runs import draw, models

from lumina import ContextDrop
from lumina.models.flops import forward_flops
from lumina.models.parts.windows import DroppedLayers, windows_of_layers
from lumina.sampling.solvers import SOLVERS

# The schedule

TIMES = st.floats(0, 1)


def test_the_schedule_in_figures():
    counts = {t: sum(ContextDrop().layers(t, 24)) for t in (-1, 0, 0.08, 0.09, 0.5, 0.91, 0.92, 1)}
    assert list(counts.values()) == [24, 24, 24, 20, 12, 4, 0, 0]
    assert ContextDrop().layers(0.4, 6) == (True, True, True, True, False, False)
    assert ContextDrop(levels=24).layers(0.26, 24) == (True,) * 18 + (False,) * 6
    assert ContextDrop(levels=1).layers(0.49, 3) == (True,) * 3
    assert ContextDrop(levels=1).layers(0.51, 3) == (False,) * 3


@given(TIMES, TIMES, st.integers(1, 50), st.integers(1, 30))
def test_the_schedule(a, b, n_layers, levels):
    drop = ContextDrop(levels=levels)
    assert all(drop.layers(0.0, n_layers)) and not any(drop.layers(1.0, n_layers))
    early, late = (drop.layers(t, n_layers) for t in sorted((a, b)))
    assert len(early) == n_layers
    assert all(x or not y for x, y in zip(early, late, strict=True))  # fewer and fewer
    assert list(early) == sorted(early, reverse=True)  # the last layers stop pooling first
    share = sum(early) / n_layers
    assert abs(share - (1 - min(a, b))) <= 0.5 / levels + 0.5 / n_layers + 1e-9
    every = {drop.layers(i / 999, n_layers) for i in range(1000)}
    assert len(every) <= levels + 1


def test_nothing_to_pool_is_none():
    assert ContextDrop().at(1.0, 6) is None
    assert ContextDrop(factor=1).at(0.0, 6) is None
    assert ContextDrop(3, log_count=False).at(0.9, 6) == DroppedLayers(
        3, (True, *[False] * 5), False
    )


def test_errors():
    for name in ("factor", "levels"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ContextDrop(**{name: 0})
    with pytest.raises(ValueError, match="NaN"):
        ContextDrop().layers(float("nan"), 3)
    (ours, _), arguments = pair(), inputs(*IMAGE)
    with pytest.raises(ValueError, match="context_drop must be for 2 layers, got 3"):
        ours(*arguments, context_drop=ContextDrop().at(0.0, 3))


# The network; `test_model.py` compares it with the reference, gradients included


def assert_close(out, expected, bound=1e-12):
    for a, b in zip(out, expected, strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("size", [IMAGE, ((3, 4, 6), (3, 2, 2), (3, 6, 2))])
def test_factor_one_is_full_attention(size):
    (ours, _), arguments = pair(), inputs(*size)
    with torch.no_grad():
        for log_count in (True, False):
            drop = DroppedLayers(1, (True, True), log_count)
            assert_close(ours(*arguments, context_drop=drop), ours(*arguments))
        nothing = DroppedLayers(2, (False, False))
        assert_close(ours(*arguments, context_drop=nothing), ours(*arguments), 0)


def test_log_count_is_for_remainders_only():
    """Where all windows are whole it is a constant of the scores, and left out."""
    ours, theirs = pair()
    drops = [DroppedLayers(2, (True, True), log_count) for log_count in (True, False)]
    for size, differ in ((3, 8, 12), False), ((3, 8, 10), True), ((3, 6, 12), True):
        arguments = inputs(*size)
        grid = (1, size[1] // 2, size[2] // 2)
        windows = windows_of_layers([grid], drops[0], 2, DEVICE)[0]
        assert windows.weighted == differ
        with torch.no_grad():
            for net in (ours, theirs):
                weighted, plain = (net(*arguments, context_drop=drop) for drop in drops)
                difference = (weighted - plain).abs().max()
                assert difference > 1e-3 if differ else difference < 1e-12


def test_equal_keys_need_no_windows():
    """The mean over all tokens is the mean over windows, each weighed by its tokens."""
    ours = pair(n_layers=1, qk_norm=False)[0]
    arguments = inputs((3, 6, 10), (3, 2, 6), (3, 14, 2))
    with torch.no_grad():
        ours.layers[0].attention.wk.weight.zero_()
        full = ours(*arguments)
        assert_close(ours(*arguments, context_drop=DroppedLayers(2, (True,))), full)
        plain = ours(*arguments, context_drop=DroppedLayers(2, (True,), False))
    assert min((a - b).abs().max() for a, b in zip(plain, full, strict=True)) > 1e-3


@pytest.mark.parametrize(
    "changes, size", [({}, (3, 6, 10)), (VIDEO, (3, 2, 6, 6)), (AUDIO, (5, 9))]
)
def test_far_windows_are_one_mean_of_each_frame(changes, size):
    (ours, theirs), arguments = pair(**changes), inputs(*size)
    with torch.no_grad():
        large, larger = (DroppedLayers(f, (True, True)) for f in (9, 50))
        out = ours(*arguments, context_drop=large)
        assert_close(out, ours(*arguments, context_drop=larger))
        assert_close(out, theirs(*arguments, context_drop=larger), 1e-11)


@functools.cache
def tiny():
    torch.manual_seed(0)
    return pair(dim=8, n_layers=2, multiple_of=8, cap_feat_dim=6)


@settings(max_examples=40, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    alike=st.booleans(),
    drop=st.builds(
        DroppedLayers,
        factor=st.integers(1, 7),
        layers=st.tuples(st.booleans(), st.booleans()),
        log_count=st.booleans(),
    ),
    base_seqlen=st.none() | st.integers(2, 20),
)
def test_any_list(grids, alike, drop, base_seqlen):
    ours, theirs = tiny()
    grids = grids[:1] * len(grids) if alike else grids
    x, B = [randn(3, 2 * h, 2 * w) for h, w in grids], len(grids)
    x = torch.stack(x) if alike else x
    rest = torch.rand(B, device=DEVICE).double(), randn(B, 3, 6), randn(B, 3) > 0
    given = dict(context_drop=drop, base_seqlen=base_seqlen)
    with torch.no_grad():
        for a, b in zip(ours(x, *rest, **given), theirs(x, *rest, **given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# The sampler; `test_sampler.py` compares it with a plain loop around the reference


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_evaluation_has_the_layers_of_its_time(monkeypatch, solver):
    model, seen = models()[0], []
    forward = model.forward

    def recorded(x=None, t=None, *args, context_drop=None, **kwargs):
        if x is not None:  # else it prepares captions
            seen.append((t[0].item(), context_drop))
        return forward(x, t, *args, context_drop=context_drop, **kwargs)

    monkeypatch.setattr(model, "forward", recorded)
    drop = ContextDrop(3)
    result = draw(solver=solver, schedule="uniform", context_drop=drop, rtol=1e-2, atol=1e-2)
    assert len(seen) == result.nfe
    assert seen == [(t, drop.at(t, 1)) for t, _ in seen]
    assert None in (drops := [given for _, given in seen]) and DroppedLayers(3, (True,)) in drops


def test_switched_off_is_the_default():
    assert torch.equal(draw(context_drop=ContextDrop(factor=1)).latents, draw().latents)


# FLOPs


@pytest.mark.parametrize("factor, keys", [(1, 15), (2, 6), (3, 2), (4, 2)])
def test_flops_saved(factor, keys):
    """q k^T and the weighted sum: 2 L D each for every key left out."""
    sizes = config(dim=96, n_heads=4, n_layers=3)
    whole = forward_flops(sizes, (6, 10), 7)
    drop = DroppedLayers(factor, (True, False, True))
    assert whole - forward_flops(sizes, (6, 10), 7, drop) == 2 * (4 * 15 * 96 * (15 - keys))
