"""Sampling with the compact model: the time of a setting and its error.

The variants are settings of `lumina.sample`, named solver-schedule-NFE (NFE: number of function
evaluations), with "-drop" where context drop is on. The column "error" is the RMS distance of the
pixels (-1..1) from a solution with 1000 midpoint steps (250 in the quick report). Context drop
changes the network, so its error does not go to zero. "eager" is one of the settings without
kernels (backend="torch").
"""

import lumina
from benchmarks.harness.case import Case
from benchmarks.harness.shapes import COMPACT
from benchmarks.models.solver_error import drawer, noise_of, rms
from lumina.sampling.solvers import SOLVERS

EXACT_STEPS = {True: 250, False: 1000}  # is the report quick? -> midpoint steps
SHAPES = (COMPACT.but(quick=True), COMPACT.but(B=8))
NFE = (4, 8, 20)
SETTINGS = {
    f"{solver}-{schedule}-{nfe}{'-drop' if drop else ''}": {
        "solver": solver, "schedule": schedule, "nfe": nfe, "context_drop": drop
    }
    for solver, cost in SOLVERS.items()
    if cost is not None  # dopri5 chooses its own steps
    for schedule in ("uniform", "rational:4", "sigmoid")
    for drop in (None, lumina.ContextDrop(2))
    for nfe in NFE
}  # fmt: skip
EAGER = "euler-uniform-8"


def variants(shape) -> tuple[str, ...]:
    names = [name for name in SETTINGS if "uniform" in name or not name.endswith("-drop")]
    if shape.quick:
        kept = ("euler-uniform", "midpoint-uniform", "ab2-uniform")
        names = [name for name in names if name.startswith(kept)]
    return ("eager", *(f"lumina-{name}" for name in names))


def case(shape, device) -> Case:
    """Pictures for B captions."""
    draw = drawer(3.0, shape.B, device=device)
    exact, _ = draw(solver="midpoint", schedule="uniform", steps=EXACT_STEPS[shape.quick])
    functions, errors = {}, {}
    for variant in variants(shape)[1:]:
        setting = SETTINGS[variant.removeprefix("lumina-")]
        functions[variant] = sampler(draw, **setting)
        drop = setting["context_drop"] is not None
        error = rms(functions[variant](), exact)
        errors[variant] = setting | {"error": error, "context_drop": drop}
    return Case(
        inputs={"latents": noise_of(shape.B).to(device)},
        ours=functions,
        eager=sampler(drawer(3.0, shape.B, device=device, backend="torch"), **SETTINGS[EAGER]),
        not_equivalent=tuple(functions),
        compiled=False,
        model=True,
        info={"x eager": None},  # eager is one setting of many
        variant_info=errors,
    )


def sampler(draw, *, nfe, solver, **setting):
    steps = nfe // SOLVERS[solver]
    return lambda **inputs: draw(**inputs, solver=solver, steps=steps, **setting)[0]


def test_sample(compare):
    compare(case)
