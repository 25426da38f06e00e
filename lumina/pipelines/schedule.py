"""The time grid that a scheduler of `diffusers` stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lumina.sampling.schedules import parse_schedule


def time_grid(
    scheduler: FlowMatchEulerDiscreteScheduler,
    steps: int,
    sigmas: Sequence[float] | None,
    schedule: str | Callable[[int], Tensor] | None,
    tokens: int | None,
) -> Tensor:
    """Times from noise to 1, the data, (steps + 1,) float64: t = 1 - sigma.

    Args:
        scheduler: makes the sigmas, unless there is a schedule; it keeps them, as in diffusers.
        steps: how many, unless there are sigmas.
        sigmas: to be shifted by the scheduler; None: those that it makes itself.
        schedule: as for `lumina.sample`.
        tokens: of a picture, which dynamic shifting depends on; None: pictures of several sizes.

    Raises:
        TypeError, ValueError: steps or sigmas that give no grid; a scheduler of another kind.
    """
    if schedule is not None:
        if sigmas is not None:
            raise ValueError("give sigmas or schedule, not both")
        return (parse_schedule(schedule) if isinstance(schedule, str) else schedule)(steps).double()
    config = scheduler.config
    shift = {}
    if config.use_dynamic_shifting:
        if tokens is None:
            raise ValueError("the scheduler shifts time by the size: several sizes need a schedule")
        shift["mu"] = _mu(config, tokens)
    if sigmas is None:
        scheduler.set_timesteps(steps, **shift)
    else:
        scheduler.set_timesteps(sigmas=list(map(float, sigmas)), **shift)
    grid = 1 - scheduler.sigmas.double()
    if len(grid) < 2 or not 0 <= grid[0] or not (grid.diff() > 0).all():
        got = [round(s, 4) for s in scheduler.sigmas.tolist()]
        raise ValueError(f"sigmas must fall from at most 1 to above 0, got {got[:-1]}")
    return grid


def check_scheduler(scheduler) -> None:
    """Raise unless its steps are Euler's, which is what the sampler's grid can stand for."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise TypeError(
            "scheduler must be a FlowMatchEulerDiscreteScheduler (other integrators are chosen by "
            f"solver=), got {type(scheduler).__name__}"
        )
    for name in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(name):
            raise ValueError(f"scheduler must not have {name}, this one has")


def timesteps_of(grid: Tensor) -> Tensor:
    """What diffusers calls the time of each step, from 1000 (noise) down."""
    return ((1 - grid[:-1]) * 1000).float()


def _mu(config, tokens: int) -> float:
    """On the line through (base_image_seq_len, base_shift), (max_image_seq_len, max_shift)."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)
