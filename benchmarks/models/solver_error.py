"""Errors of the solvers against the exact solution: `python -m benchmarks.models.solver_error`

Draws pictures from the same noise and captions with every solver, schedule and number of function
evaluations (NFE), on the shipped compact model. Prints the RMS distance of the pixels (-1..1) from
a solution with 1000 midpoint steps, as a Markdown table; with `--orders`, the measured orders of
convergence instead.
"""

import argparse
import functools
import math

import torch

import lumina
from lumina.sampling import schedules
from lumina.sampling.solvers import SOLVERS

PROMPTS = (
    "red apple", "smiling face with sunglasses", "octopus", "fire engine", "pizza", "snowman",
    "rocket", "umbrella",
)  # fmt: skip
SCHEDULES = {
    "uniform": schedules.uniform,
    "rational:2": functools.partial(schedules.rational, shift=2.0),
    "rational:4": functools.partial(schedules.rational, shift=4.0),
    "sigmoid": schedules.sigmoid,
}
NFE = (4, 8, 12, 20, 40)
TOLERANCES = (0.1, 0.03, 0.01)


def drawer(guidance: float, count: int, dtype=torch.float32, device="cpu", backend=None):
    """A function of the settings of `lumina.sample` that returns (pictures, NFE). The noise is
    always the same."""
    model = lumina.load(lumina.COMPACT, dtype=dtype, device=device, backend=backend)
    encoder = lumina.load_caption_encoder(lumina.COMPACT, dtype=dtype, device=device)
    captions, negative = encoder(list(PROMPTS[:count])), encoder([""])
    noise = noise_of(count).to(device)

    def draw(**settings):
        settings = {"size": (32, 32), "latents": noise, "guidance": guidance} | settings
        result = lumina.sample(model, *captions, *negative, **settings)
        return result.latents, result.nfe

    return draw


def noise_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


def table(guidance: float) -> None:
    draw = drawer(guidance, len(PROMPTS))
    exact, _ = draw(solver="midpoint", schedule="uniform", steps=1000)
    print(f"guidance {guidance}, {len(PROMPTS)} pictures\n")
    print("| solver | schedule | " + " | ".join(f"NFE {n}" for n in NFE) + " |")
    print("|---|---|" + "---|" * len(NFE))
    for solver, cost in SOLVERS.items():
        if cost is None:
            continue
        for name, schedule in SCHEDULES.items():
            errors = []
            for n in NFE:
                pictures, nfe = draw(solver=solver, schedule=schedule, steps=n // cost)
                assert nfe == n
                errors.append(f"{rms(pictures, exact):.3f}")
            print(f"| {solver} | {name} | " + " | ".join(errors) + " |", flush=True)
    for tolerance in TOLERANCES:
        pictures, nfe = draw(solver="dopri5", steps=1, rtol=tolerance, atol=tolerance)
        print(f"dopri5, rtol = atol = {tolerance}: {rms(pictures, exact):.4f} after NFE {nfe}")


def orders(guidance: float) -> None:
    draw = drawer(guidance, 1, torch.float64)
    exact, _ = draw(solver="rk4", schedule="uniform", steps=400)
    for solver, cost in SOLVERS.items():
        if cost is None:
            continue
        steps = (100, 200) if cost < 4 else (50, 100)
        coarse, fine = (
            rms(draw(solver=solver, schedule="uniform", steps=n)[0], exact) for n in steps
        )
        order = math.log2(coarse / fine)
        print(f"{solver}: {coarse:.2e}, {fine:.2e} at {steps} steps: order {order:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guidance", type=float, default=3.0, help="weight (default: %(default)s)")
    parser.add_argument("--orders", action="store_true", help="measure orders of convergence")
    args = parser.parse_args()
    (orders if args.orders else table)(args.guidance)
