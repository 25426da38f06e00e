"""The time grid that a scheduler of `diffusers` stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lumina.pipelines.call import check_scale, is_count
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
    first, count = (1, steps) if sigmas is None else (next(iter(sigmas), 0), len(sigmas))
    if config.get("shift_terminal") and count == 1 and first == 1:
        raise ValueError("a scheduler with shift_terminal needs at least 2 steps, got 1")
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
    if check_scale("shift of the scheduler", scheduler.shift) <= 0:
        raise ValueError(f"shift of the scheduler must be above 0, got {scheduler.shift}")
    end = scheduler.config.get("shift_terminal")
    if end is not None and not 0 <= check_scale("shift_terminal of the scheduler", end) < 1:
        raise ValueError(f"shift_terminal of the scheduler must lie in [0, 1), got {end}")
    if scheduler.config.use_dynamic_shifting:
        few, many, low, high = _line(scheduler.config)
        if not is_count(few) or not is_count(many) or few >= many:
            raise ValueError(
                "base_image_seq_len of the scheduler must be a whole number below its "
                f"max_image_seq_len, got {few!r} and {many!r}"
            )
        check_scale("base_shift of the scheduler", low)
        check_scale("max_shift of the scheduler", high)


def timesteps_of(grid: Tensor) -> Tensor:
    """What diffusers calls the time of each step, from 1000 (noise) down."""
    return ((1 - grid[:-1]) * 1000).float()


def _mu(config, tokens: int) -> float:
    """On the line through (base_image_seq_len, base_shift), (max_image_seq_len, max_shift)."""
    few, many, low, high = _line(config)
    return low + (high - low) * (tokens - few) / (many - few)


def _line(config) -> tuple[int, int, float, float]:
    """base_image_seq_len, max_image_seq_len, base_shift, max_shift."""
    return (
        config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5), config.get("max_shift", 1.15),
    )  # fmt: skip
