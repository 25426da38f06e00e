"""Time grids: the numbers of the formulas, and what every grid must be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.sampling.schedules import parse_schedule, rational, sigmoid, start_at, uniform

quick = settings(max_examples=60, deadline=None)
step_counts = st.integers(1, 200)
shifts = st.floats(0.1, 100)


def check(grid, steps):
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert grid.device.type == "cpu"
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()


@quick
@given(step_counts, shifts)
def test_uniform_and_rational(steps, shift):
    check(uniform(steps), steps)
    check(rational(steps, shift), steps)
    want = [i / steps for i in range(steps + 1)]
    assert uniform(steps).tolist() == want
    want = [u / (shift - (shift - 1) * u) for u in want]
    torch.testing.assert_close(rational(steps, shift).tolist(), want, rtol=1e-12, atol=0)
    assert torch.equal(rational(steps, 1.0), uniform(steps))


@quick
@given(step_counts, st.floats(0.1, 0.9), st.floats(1, 20), st.floats(1, 25))
def test_sigmoid(steps, mu, alpha, beta):
    check(sigmoid(steps, mu, alpha, beta), steps)


def test_rational_is_the_sigma_shift_of_sd3():
    sigma = torch.linspace(1, 0, 11, dtype=torch.float64)
    shifted = 4 * sigma / (1 + 3 * sigma)
    torch.testing.assert_close(rational(10), 1 - shifted, rtol=0, atol=1e-15)


def test_sigmoid_numbers():
    """Step lengths sigmoid(6 (u - 0.6)) below 0.6 and sigmoid(-20 (u - 0.6)) above, summed."""
    want = [0.0, 0.025, 0.069, 0.145, 0.273, 0.475, 0.773, 0.961, 0.995, 0.999, 1.0]
    torch.testing.assert_close(sigmoid(10).tolist(), want, rtol=0, atol=1e-3)


@quick
@given(st.sampled_from((uniform, rational, sigmoid)), step_counts, st.floats(1e-6, 1))
def test_start_at(schedule, steps, strength):
    grid = schedule(steps)
    part = start_at(grid, strength)
    assert part[0] == 1 - strength and part[-1] == 1 and (part.diff() > 0).all()
    n = len(part) - 1
    assert torch.equal(part[1:], grid[len(grid) - n :])  # a tail of the grid
    at = int((grid <= 1 - strength).sum()) - 1  # the step that t0 falls into
    assert steps - at - 1 <= n <= steps - at
    before = grid.diff().tolist()
    shortest = min([before[at] / 2, *before[at + 1 : at + 2]])
    assert part.diff()[0] >= shortest * (1 - 1e-9) or n == 1  # no sliver


def test_start_at_numbers():
    grid = uniform(10)
    assert torch.equal(start_at(grid, 1.0), grid)
    assert torch.equal(start_at(rational(7), 1), rational(7))
    assert start_at(grid, 0.56).tolist() == pytest.approx([0.44, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    assert start_at(grid, 0.54).tolist() == pytest.approx([0.46, 0.6, 0.7, 0.8, 0.9, 1])
    assert len(start_at(grid, 0.6)) == 7 and len(start_at(grid, 0.7)) == 8  # on a point: no extra
    assert start_at(grid, 0.01).tolist() == [0.99, 1]


def test_start_at_errors():
    for strength in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"in \(0, 1\], got"):
            start_at(uniform(4), strength)
    with pytest.raises(ValueError, match="leaves no time"):
        start_at(uniform(4), 1e-20)
    with pytest.raises(ValueError, match="from 0 to 1, got"):
        start_at(uniform(4)[1:], 0.5)


def test_parse():
    for spec, grid in (
        ("uniform", uniform(7)),
        ("rational", rational(7, 4.0)),
        ("rational:6.5", rational(7, 6.5)),
        ("sigmoid", sigmoid(7, 0.6, 6, 20)),
        (" sigmoid:0.5, 4, 9 ", sigmoid(7, 0.5, 4, 9)),
    ):
        assert torch.equal(parse_schedule(spec)(7), grid)


@pytest.mark.parametrize(
    ("spec", "message"),
    (
        ("cosine", "one of uniform, rational, sigmoid, got 'cosine'"),
        ("", "one of uniform, rational, sigmoid, got ''"),
        ("uniform:3", "written uniform, got 'uniform:3'"),
        ("rational:", "must be numbers, got 'rational:'"),
        ("rational:4,5", "written rational:shift, got 'rational:4,5'"),
        ("rational:x", "must be numbers, got 'rational:x'"),
        ("rational:-1", "shift must be finite and positive, got -1.0"),
        ("rational:inf", "shift must be finite and positive, got inf"),
        ("sigmoid:0.6", "written sigmoid:mu,alpha,beta, got"),
        ("sigmoid:1,6,20", r"mu must lie inside \(0, 1\), got 1.0"),
        ("sigmoid:0.6,0,20", "alpha and beta must be finite and positive, got 0.0 and 20.0"),
        ("sigmoid:0.6,6,nan", "alpha and beta must be finite and positive"),
    ),
)
def test_parse_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(spec)


def test_step_errors():
    for schedule in (uniform, rational, sigmoid, parse_schedule("sigmoid")):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            schedule(0)
        for steps in (2.0, True, "3"):
            with pytest.raises(TypeError, match="steps must be an int, got"):
                schedule(steps)


def test_points_that_coincide():
    with pytest.raises(ValueError, match="shift=1e-20 with 4 steps puts two points"):
        rational(4, 1e-20)
    with pytest.raises(ValueError, match="beta=1000.0 with 9 steps puts two points"):
        sigmoid(9, beta=1000.0)
