"""Time grids for the sampler: from t = 0 (noise) to t = 1 (data), in `steps` intervals.

Every schedule returns a float64 CPU tensor of steps + 1 points, strictly increasing,
with exact ends.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def uniform(steps: int) -> Tensor:
    """t_i = i / steps, (steps + 1,)."""
    _check_steps(steps)
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def rational(steps: int, shift: float = 4.0) -> Tensor:
    """Time shift: t = u / (shift - (shift - 1) u) on a uniform grid u, (steps + 1,).

    shift = 1 is uniform; above 1 the steps are shorter near the noise (slope 1 / shift there, shift
    at the data). Equals the sigma shift of Stable Diffusion 3; Lumina-Next was released with 4.

    Raises:
        ValueError: shift is not finite and positive, or so extreme that two points coincide.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be finite and positive, got {shift}")
    u = uniform(steps)
    return _increasing(u / (u + shift * (1 - u)), f"shift={shift}")  # no cancellation; 1 stays 1


def sigmoid(steps: int, mu: float = 0.6, alpha: float = 6.0, beta: float = 20.0) -> Tensor:
    """Piecewise sigmoid of Lumina-Next, (steps + 1,): short steps at both ends, long around mu.

    The length of the step at the index u in (0, 1) is proportional to sigmoid(alpha (u - mu)) below
    mu, and to 1 - sigmoid(beta (u - mu)) above.

    The paper's formula has a wrong sign somewhere: the sigmoid may be meant as the step length or
    as the map u -> t. As step length it came closer to a solution of 1000 steps in 11 of 15 cases
    (compact model; Euler, midpoint, ab2; 4 to 40 evaluations), and in all cases from 20 on.

    Args:
        steps: number of intervals.
        mu: where, in the index u, the two pieces meet.
        alpha: steepness below mu.
        beta: steepness above mu.

    Raises:
        ValueError: a parameter out of range, or so steep that two points coincide.
    """
    _check_steps(steps)
    if not 0 < mu < 1:
        raise ValueError(f"mu must lie inside (0, 1), got {mu}")
    if not (math.isfinite(alpha) and math.isfinite(beta) and alpha > 0 and beta > 0):
        raise ValueError(f"alpha and beta must be finite and positive, got {alpha} and {beta}")
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps - mu
    length = torch.sigmoid(torch.where(u < 0, alpha, -beta) * u)
    grid = torch.cat([length.new_zeros(1), length.cumsum(0)])
    return _increasing(grid / grid[-1], f"mu={mu}, alpha={alpha}, beta={beta}")


def start_at(grid: Tensor, strength: float) -> Tensor:
    """The part of a grid that image-to-image runs: from t0 = 1 - strength to the end.

    The first point is t0 exactly, so the input is noised to the level asked for; the others are
    those of `grid` beyond t0, so the cost falls with the strength. If less than half remains of the
    step that t0 falls into, that remainder is merged into the next step.

    Args:
        grid: (N,), strictly increasing, from 0 to 1.
        strength: in (0, 1]. 1 starts from noise and returns the grid as it is.

    Raises:
        ValueError: grid does not run from 0 to 1; strength is out of range, or leaves no time.
    """
    points = grid.tolist()
    if len(points) < 2 or points[0] != 0 or points[-1] != 1:
        raise ValueError(f"grid must run from 0 to 1, got {points}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    t0 = 1 - strength
    if t0 >= 1:
        raise ValueError(f"strength {strength} leaves no time between 1 - strength and 1")
    first = next(i for i, t in enumerate(points) if t > t0)
    rest, step = points[first] - t0, points[first] - points[first - 1]
    if rest < step / 2 and first + 1 < len(points):
        first += 1
    return torch.cat([grid.new_tensor([t0]), grid[first:]])


_PARAMETERS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "uniform": (uniform, ()),
    "rational": (rational, ("shift",)),
    "sigmoid": (sigmoid, ("mu", "alpha", "beta")),
}


def parse_schedule(spec: str) -> Callable[[int], Tensor]:
    """Schedule from the command line: "uniform", "rational:4", "sigmoid" or "sigmoid:0.6,6,20".

    Returns:
        A function steps -> grid.

    Raises:
        ValueError: unknown name, wrong number of parameters, or a bad value.
    """
    name, colon, text = spec.strip().partition(":")
    if name not in _PARAMETERS:
        raise ValueError(f"schedule must be one of {', '.join(_PARAMETERS)}, got {name!r}")
    schedule, names = _PARAMETERS[name]
    given = text.split(",") if colon else []
    if colon and len(given) != len(names):
        form = f"{name}:{','.join(names)}" if names else name
        raise ValueError(f"schedule {name!r} is written {form}, got {spec!r}")
    try:
        values = [float(x) for x in given]
    except ValueError:
        raise ValueError(f"the parameters of a schedule must be numbers, got {spec!r}") from None
    schedule(1, *values)  # a value out of range is refused now
    return lambda steps: schedule(steps, *values)


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps must be an int, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def _increasing(grid: Tensor, parameters: str) -> Tensor:
    if not bool((grid.diff() > 0).all()):  # NaN fails too
        steps = len(grid) - 1
        raise ValueError(f"{parameters} with {steps} steps puts two points of the grid at one time")
    return grid
