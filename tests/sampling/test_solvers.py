"""Solvers: order of convergence, tolerance, counts, and states of several tensors."""

import math

import pytest
import torch

from lumina.sampling import solvers
from lumina.sampling.schedules import rational, uniform
from lumina.sampling.solvers import SOLVERS, solve

FIXED = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2}  # name -> order


def velocity(t, x):
    """Nonlinear and time dependent, with x(t) = 1 / (1 / x(0) + sin t)."""
    return -math.cos(t) * x * x


def solution(x0, t):
    return 1 / (1 / x0 + math.sin(t))


X0 = torch.linspace(0.5, 2, 7, dtype=torch.float64)


def logistic(t, x):
    return 4 * x * (1 - x)


def logistic_solution(x0, t):
    return 1 / (1 + (1 / x0 - 1) * math.exp(-4 * t))


PROBLEMS = {"time": (velocity, solution), "logistic": (logistic, logistic_solution)}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("grid", (uniform, rational))
@pytest.mark.parametrize("solver", FIXED)
def test_order_of_convergence(solver, grid, problem):
    f, exact = PROBLEMS[problem]
    errors = []
    for steps in (80, 160, 320):
        x, nfe = solve(f, X0, grid(steps), solver)
        assert nfe == steps * SOLVERS[solver]
        errors.append((x - exact(X0, 1.0)).abs().max().item())
    order = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert order == pytest.approx([FIXED[solver]] * 2, abs=0.12)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("tolerance", (1e-3, 1e-5, 1e-7, 1e-9))
def test_dopri5_meets_its_tolerance(tolerance, problem):
    f, exact = PROBLEMS[problem]
    calls = []
    x, nfe = solve(
        lambda t, x: (calls.append(t), f(t, x))[1],
        X0, [0, 1], "dopri5", rtol=tolerance, atol=tolerance,
    )  # fmt: skip
    assert nfe == len(calls) and nfe % 6 == 2 and all(0 <= t <= 1 for t in calls)
    error = (x - exact(X0, 1.0)) / (tolerance * (1 + exact(X0, 1.0)))
    assert error.square().mean().sqrt() < 5
    assert nfe < 12 * tolerance**-0.2 + 30  # 5th order: a wrong coefficient takes far more


def test_dopri5_coefficients():
    """The conditions of order 5 that involve the nodes and the weights, and FSAL."""
    nodes, rows, error = solvers._NODES, solvers._ROWS, solvers._ERROR
    for c, row in zip(nodes, rows, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-14)
    for p in range(5):
        moment = [c**p for c in nodes]
        fifth = sum(b * m for b, m in zip(rows[6], moment, strict=False))
        assert fifth == pytest.approx(1 / (p + 1), abs=1e-14)
        defect = sum(e * m for e, m in zip(error, moment, strict=True))
        assert abs(defect) < 1e-14 if p < 4 else abs(defect) > 1e-4
    for p in range(1, 4):  # sum b_i a_ij c_j^p
        inner = [sum(a * c**p for a, c in zip(row, nodes, strict=False)) for row in rows]
        total = sum(b * s for b, s in zip(rows[6], inner, strict=False))
        assert total == pytest.approx(1 / ((p + 1) * (p + 2)), abs=1e-14)


def test_dopri5_counts_rejected_steps():
    """A narrow peak, of integral 1 over the line, that growing steps run into."""
    width, steps = 0.01, []

    def peak(t, x):
        return torch.full_like(x, 1 / (math.pi * width * (1 + ((t - 0.6) / width) ** 2)))

    x, nfe = solve(
        peak, torch.zeros(1, dtype=torch.float64), uniform(3), "dopri5", rtol=1e-6, atol=1e-6,
        callback=lambda i, t, x: steps.append((i, t)),
    )  # fmt: skip
    want = (math.atan(0.4 / width) + math.atan(0.6 / width)) / math.pi
    assert abs(x.item() - want) < 1e-5
    assert [i for i, _ in steps] == list(range(len(steps)))
    times = [0.0] + [t for _, t in steps]
    assert times[-1] == 1.0 and all(a < b for a, b in zip(times[:-1], times[1:], strict=True))
    rejected = (nfe - 2) // 6 - len(steps)
    assert rejected >= 3


def test_dopri5_takes_a_step_for_a_constant_velocity():
    x, nfe = solve(lambda t, x: torch.ones_like(x), torch.zeros(3), [0, 1], "dopri5")
    assert (x - 1).abs().max() < 1e-6 and nfe <= 2 + 5 * 6
    x, nfe = solve(lambda t, x: torch.zeros_like(x), torch.zeros(3), [0, 1], "dopri5")
    assert (x == 0).all() and nfe <= 2 + 12 * 6


def test_evaluation_times():
    times = {
        "euler": [0, 0.5],
        "midpoint": [0, 0.25, 0.5, 0.75],
        "heun": [0, 0.5, 0.5, 1],
        "rk4": [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1],
        "ab2": [0, 0.5],
    }
    for solver, want in times.items():
        got = []
        solve(lambda t, x, got=got: (got.append(t), x)[1], X0, uniform(2), solver)
        assert got == want and all(type(t) is float for t in got)


def test_multistep_on_uneven_steps_is_exact_but_for_its_start():
    """x' = t: the Euler step of length 0.1 loses 0.1^2 / 2, and nothing else does."""
    x, nfe = solve(
        lambda t, x: torch.full_like(x, t), torch.zeros(1, dtype=torch.float64),
        [0.0, 0.1, 0.4, 0.45, 1.0], "ab2",
    )  # fmt: skip
    assert x.item() == pytest.approx(0.5 - 0.005, abs=1e-15) and nfe == 4


def coupled(t, x):
    """On a list, each tensor depends on the mean of all, as within a single tensor."""
    mean = torch.cat([xi.flatten() for xi in x]).mean()
    return [torch.cos(3 * xi + t) - mean for xi in x]


@pytest.mark.parametrize("solver", SOLVERS)
def test_list_equals_one_tensor(solver):
    x = torch.randn(26, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = (x[:6].view(2, 3), x[6:].view(4, 5))
    one, nfe = solve(lambda t, x: coupled(t, [x])[0], x, uniform(5), solver)
    for kind in (tuple, list):
        seen = []
        many, n = solve(
            coupled, kind(parts), uniform(5), solver,
            callback=lambda i, t, x, seen=seen: seen.append(x),
        )  # fmt: skip
        assert n == nfe and isinstance(many, list) and [m.shape for m in many] == [(2, 3), (4, 5)]
        got = torch.cat([m.flatten() for m in many])
        torch.testing.assert_close(got, one, rtol=0, atol=1e-13)
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], many, strict=True))


@pytest.mark.parametrize("solver", FIXED)
def test_callback(solver):
    grid, seen = rational(4), []
    x, _ = solve(velocity, X0, grid, solver, callback=lambda *step: seen.append(step))
    assert [(i, t) for i, t, _ in seen] == list(enumerate(grid.tolist()[1:]))
    assert torch.equal(seen[-1][2], x)
    half, _ = solve(velocity, X0, grid[:3], solver)
    assert torch.equal(seen[1][2], half)


@pytest.mark.parametrize("solver", SOLVERS)
def test_input_is_left_alone_and_a_reused_buffer_is_harmless(solver):
    x, buffer = X0.clone(), torch.empty_like(X0)

    def same_buffer(t, x):
        return buffer.copy_(velocity(t, x))

    got, _ = solve(same_buffer, x, uniform(6), solver)
    want, _ = solve(velocity, x, uniform(6), solver)
    assert torch.equal(got, want) and torch.equal(x, X0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("solver", FIXED)
def test_low_precision_steps_are_summed_in_float32(solver, dtype):
    """400 steps of 2^-12: in bfloat16 and float16, 1 + 2^-12 is 1 and nothing would move."""
    grid = torch.arange(401, dtype=torch.float64) * 2.0**-12
    for x in (torch.ones(2), torch.ones(2, dtype=dtype)):
        seen = []

        def one(t, y, seen=seen):
            seen.append(y.dtype)
            return torch.ones(2, dtype=dtype)

        got, _ = solve(one, x, grid, solver)
        assert got.dtype == x.dtype and set(seen) == {x.dtype}
        want = torch.full((2,), 1 + 400 * 2.0**-12)
        assert torch.equal(got, want.to(x.dtype))


def test_gradient_flows_through():
    x = X0.clone().requires_grad_()
    for solver in SOLVERS:
        y, _ = solve(velocity, x, uniform(200), solver, rtol=1e-8, atol=1e-8)
        (grad,) = torch.autograd.grad(y.sum(), x)
        want = (1 / X0) ** 2 / (1 / X0 + math.sin(1)) ** 2
        assert (grad - want).abs().max() < (0.1 if solver == "euler" else 5e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (
            {"solver": "dpm"},
            ValueError,
            "one of euler, midpoint, heun, rk4, ab2, dopri5, got 'dpm'",
        ),
        ({"grid": [0.0]}, ValueError, "at least two finite times"),
        ({"grid": [0.0, math.nan]}, ValueError, "at least two finite times"),
        ({"grid": [0.0, 0.5, 0.5, 1]}, ValueError, "strictly increasing, got 0.5 before 0.5"),
        ({"grid": torch.tensor([1.0, 0.0])}, ValueError, "strictly increasing, got 1.0 before 0.0"),
        ({"rtol": 0.0}, ValueError, "rtol must be finite and positive, got 0.0"),
        ({"atol": -1.0}, ValueError, "atol must be finite and positive, got -1.0"),
        ({"x": torch.ones(2, dtype=torch.int64)}, TypeError, "floating tensor .*got torch.int64"),
        ({"x": [1.0]}, TypeError, "floating tensor .*got float"),
        ({"x": []}, ValueError, "at least one tensor, got none"),
        ({"velocity": lambda t, x: x[:1]}, ValueError, r"shapes \[\(7,\)\], got \[\(1,\)\]"),
        ({"velocity": lambda t, x: [x, x]}, ValueError, r"got \[\(7,\), \(7,\)\]"),
    ),
)
def test_errors(change, error, message):
    kwargs = {"velocity": velocity, "x": X0, "grid": uniform(4)} | change
    with pytest.raises(error, match=message):
        solve(**kwargs)


def test_dopri5_gives_up(monkeypatch):
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="step vanished at t = 0.9999"):  # the pole is at 1
        solve(lambda t, x: x * x, one, [0, 2], "dopri5")
    with pytest.raises(RuntimeError, match="at t = 0 is not finite"):
        solve(lambda t, x: x * math.nan, one, [0, 1], "dopri5")
    with pytest.raises(RuntimeError, match="step vanished at t = 0.[1-9]"):
        solve(lambda t, x: x * (math.nan if t > 0.5 else 1), one, [0, 1], "dopri5")
    monkeypatch.setattr(solvers, "MAX_NFE", 100)
    calls = []
    with pytest.raises(RuntimeError, match="after 98 evaluations"):
        solve(
            lambda t, x: (calls.append(t), 1e4 * torch.cos(1e4 * t + x))[1],
            one, [0, 1], "dopri5",
        )  # fmt: skip
    assert len(calls) == 98
