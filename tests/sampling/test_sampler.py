"""lumina.sample against plain loops around lumina.reference, and against diffusers."""

import functools
import math

import pytest
import torch
from common import DEVICE
from networks import pair
from sampling_runs import SIZE, assert_same, captions, draw, loop, models, noise

from lumina import ContextDrop, Guidance, RopeScaling, save
from lumina.sampling import flow
from lumina.sampling.schedules import rational
from lumina.sampling.solvers import SOLVERS, solve

SETTINGS = {
    "plain": {},
    "one": dict(guidance=1.0),
    "less": dict(guidance=0.3),
    "away": dict(guidance=-1.0),
    "channels": dict(guidance=Guidance(channels=3)),
    "until": dict(guidance=Guidance(until=0.4)),
    "never": dict(guidance=Guidance(until=0.0)),
    "renorm": dict(guidance=Guidance(renorm=1.0)),
    "renorm loose": dict(guidance=Guidance(renorm=1.7)),
    "all": dict(guidance=Guidance(7.0, channels=2, until=0.7, renorm=0.9)),
    "rope": dict(rope_scaling=RopeScaling("watershed", 2.0, watershed=0.4), base_seqlen=3),
    "drop": dict(context_drop=ContextDrop()),
    "rope by size": dict(rope_scaling=RopeScaling("time_aware", base_size=2)),
}


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("name", SETTINGS)
def test_as_a_plain_loop(name, solver):
    given = SETTINGS[name]
    result = draw(solver=solver, **given)
    expected = loop(models()[1], noise(), rational(3, 2.0), solver, **given)
    assert_same(result.latents, expected)
    assert result.latents.dtype == torch.float64
    plain = loop(models()[1], noise(), rational(3, 2.0), solver)
    assert name == "plain" or (expected - plain).abs().max() > 1e-3  # the setting does something


@pytest.mark.parametrize("kind, size", [("video", (3, 4, 2)), ("video", SIZE), ("audio", (7,))])
def test_other_axes(kind, size):
    ours, theirs = models(kind)
    result = draw(ours, size=size, latents=noise(*size))
    assert_same(result.latents, loop(theirs, noise(*size), rational(3, 2.0)))


# Evaluations


@pytest.fixture
def calls(monkeypatch):
    """(number of captions, t) of every call of the network."""
    model, seen = models()[0], []
    forward = model.forward

    def counted(x=None, t=None, *caption, **kwargs):
        if x is not None:  # else it prepares captions
            seen.append((len(caption[0].mask), t[0].item()))
            assert t.shape == (len(x),) and bool((t == t[0]).all())
        return forward(x, t, *caption, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    return seen


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted(calls, solver):
    result = draw(solver=solver, rtol=1e-2, atol=1e-2)
    assert result.nfe == len(calls) > 2
    if SOLVERS[solver]:
        assert result.nfe == 3 * SOLVERS[solver]
    assert {images for images, _ in calls} == {4 if SOLVERS[solver] else 2}  # dopri5: one by one


def test_without_guidance_half_the_network(calls):
    draw(guidance=1.0)
    assert [images for images, _ in calls] == [2, 2, 2]
    expected = draw(guidance=1.0).latents
    feats, mask, negative, negative_mask = captions()
    for unused in ((), (None, None), (negative * torch.nan, negative_mask)):
        assert torch.equal(draw(texts=(feats, mask, *unused), guidance=1.0).latents, expected)


def test_truncated_guidance_spares_the_network(calls):
    draw(schedule="uniform", steps=4, guidance=Guidance(until=0.5))
    assert calls == [(4, 0.0), (4, 0.25), (2, 0.5), (2, 0.75)]


def test_guidance_and_euler_are_one_op(monkeypatch):
    """Where nothing but the update needs the guided velocity; with the same settings."""
    seen, op = [], flow.guided_step

    def recorded(x, v, weight, dt, channels=None, *, backend=None):
        seen.append((weight, round(dt, 12), channels, backend))
        return op(x, v, weight, dt, channels, backend=backend)

    monkeypatch.setattr(flow, "guided_step", recorded)
    four = dict(schedule="uniform", steps=4)
    draw(**four, guidance=Guidance(channels=3, until=0.5))
    assert seen == [(4.0, 0.25, 3, "torch")] * 2
    for other in (
        dict(solver="midpoint"), dict(guidance=Guidance(renorm=1.0)), dict(guidance=1.0),
        dict(size=[SIZE, SIZE], latents=list(noise())),
    ):  # fmt: skip
        draw(**four, **other)
    assert len(seen) == 2


# Solvers


def test_an_euler_step_of_ones_own():
    """In the state's precision; counted, checked and called back as any other."""
    seen, calls = [], []

    def step(t, dt, x):
        calls.append((t, dt, x.dtype))
        return x + dt * t

    x = torch.ones(2, dtype=torch.bfloat16)
    out, nfe = solve(
        None, x, [0.0, 0.5, 0.75], "euler", euler_step=step, callback=lambda *a: seen.append(a)
    )
    assert nfe == 2 and calls == [(0.0, 0.5, torch.float32), (0.5, 0.25, torch.float32)]
    assert out.dtype == torch.bfloat16 and out.tolist() == [1.125] * 2
    assert [(i, t, z[0].item()) for i, t, z in seen] == [(0, 0.5, 1.0), (1, 0.75, 1.125)]
    with pytest.raises(ValueError, match=r"must return shapes \[\(2,\)\], got \[\(1,\)\]"):
        solve(None, x, [0.0, 1.0], "euler", euler_step=lambda t, dt, x: x[:1])
    with pytest.raises(ValueError, match="euler_step is for solver 'euler', got 'heun'"):
        solve(None, x, [0.0, 1.0], "heun", euler_step=step)


def test_dopri5_is_the_solution():
    for tolerance in (1e-3, 1e-6):
        result = draw(solver="dopri5", rtol=tolerance, atol=tolerance)
        assert_same(result.latents, solution(), 10 * tolerance)


@functools.cache
def solution():
    return draw(solver="rk4", steps=128, schedule="uniform").latents


ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2, "rk4": 4}


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver):
    """With guidance up to the end, where heun and rk4 evaluate too."""
    draws = (draw(solver=solver, steps=n, schedule="uniform").latents for n in (32, 64))
    coarse, fine = ((x - solution()).norm() for x in draws)
    assert abs(math.log2(coarse / fine) - ORDERS[solver]) < 0.25


def test_time_has_the_precision_of_the_state():
    """In float32 the times would be off by 1e-8, and so the last digits of everything."""
    ours, theirs = models()
    result = draw(schedule=lambda n: torch.tensor([0.0, 1 / 3, 0.7, 1.0], dtype=torch.float64))
    grid = torch.tensor([0.0, 1 / 3, 0.7, 1.0], dtype=torch.float64)
    assert_same(result.latents, loop(theirs, noise(), grid), 1e-12)


# Precision, callback, progress


def test_a_16_bit_network_keeps_the_state_in_32():
    ours = pair(dim=48, n_layers=1, in_channels=4)[0].to(torch.bfloat16)
    feats, mask, *_ = captions()
    states, times = [], []
    forward = ours.forward

    def seen(x=None, t=None, *args, **kwargs):
        if x is not None:
            assert x.dtype == torch.bfloat16
            times.append(t)
        return forward(x, t, *args, **kwargs)

    ours.forward = seen
    result = draw(
        ours, (feats, mask), steps=100, schedule="uniform", guidance=1.0,
        callback=lambda i, t, x: states.append(x.clone()),
    )  # fmt: skip
    assert {x.dtype for x in [*states, result.latents]} == {torch.float32}
    assert (torch.cat(times).float().unique() * 100).round().tolist() == list(range(100))
    caption = ours.encode_caption(feats.bfloat16(), mask)
    x = noise().float()
    for i in range(100):
        t = torch.full((2,), i / 100, device=DEVICE)
        x = x + forward(x.bfloat16(), t, caption).detach().float() * ((i + 1) / 100 - i / 100)
    assert_same(result.latents, x, 1e-6)


def test_callback_and_progress(capfd):
    seen = []
    result = draw(callback=lambda *args: seen.append(args), progress=True)
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == rational(3, 2.0)[1:].tolist()
    assert torch.equal(seen[-1][2], result.latents)
    grid = rational(3, 2.0)
    assert_same(seen[0][2], loop(models()[1], noise(), grid[:2]))
    assert "3/3" in capfd.readouterr().err
    draw(solver="dopri5", rtol=1e-1, atol=1e-1, progress=True)
    assert "step" in capfd.readouterr().err
    draw()
    assert capfd.readouterr().err == ""


# diffusers


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_the_loop_of_diffusers(tmp_path, shift):
    diffusers = pytest.importorskip("diffusers")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    ours = pair(dim=144, n_layers=2, in_channels=4, learn_sigma=True)[0].float().eval()
    save(ours, tmp_path, format="diffusers")
    theirs = diffusers.LuminaNextDiT2DModel.from_pretrained(tmp_path).eval().to(DEVICE)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(6, device=DEVICE)
    feats, mask, negative, negative_mask = captions()
    negative = torch.nn.functional.pad(negative, (0, 0, 0, 2))  # one length, for diffusers
    negative_mask = torch.nn.functional.pad(negative_mask, (0, 2))
    table = embeddings.get_2d_rotary_pos_embed_lumina(theirs.head_dim, 24, 24)

    x = noise().float()
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            out = theirs(
                torch.cat([x, x]), 1 - timestep.expand(4) / 1000,
                torch.cat([feats, negative]).float(), torch.cat([mask, negative_mask]),
                image_rotary_emb=table, cross_attention_kwargs={}, return_dict=False,
            )[0]  # fmt: skip
        cond, uncond = out.chunk(2, dim=1)[0].chunk(2)  # without the sigmas; captions come first
        guided = uncond[:, :3] + 4.0 * (cond[:, :3] - uncond[:, :3])
        v = torch.cat([guided, cond[:, 3:]], dim=1)  # the fourth channel from the captions' half
        x = scheduler.step(-v, timestep, x, return_dict=False)[0]  # in sigma = 1 - t

    result = draw(
        ours, captions(), latents=noise().float(), guidance=Guidance(4.0, channels=3), steps=6,
        schedule=lambda steps: 1 - scheduler.sigmas.double(),
    )  # fmt: skip
    assert result.nfe == 6 and (x - noise()).abs().max() > 1
    assert (result.latents - x).abs().max() <= 1e-4
