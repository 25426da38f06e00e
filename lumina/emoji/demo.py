"""The pictures of the README: `python -m lumina demo`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import lumina
from lumina.emoji.pictures import check_picture, save_picture
from lumina.models.next_dit.reference import NextDiT
from lumina.progress import progress
from lumina.sampling.schedules import parse_schedule
from lumina.sampling.solvers import solve

DEMO = [
    ("en", "a red apple"),
    ("en", "an octopus"),
    ("de", "ein Kaktus"),
    ("fr", "éléphant"),
    ("es", "un plátano"),
    ("it", "cuore rosso"),
    ("ja", "消防車"),
    ("zh", "老虎头"),
    ("ru", "пицца"),
    ("ko", "펭귄"),
    ("tr", "futbol topu"),
    ("pt", "girassol"),
]


def draw_demo(out: Path, seed: int = 0) -> None:
    """Draw `DEMO` and compare with the same pictures drawn by `lumina.reference.NextDiT`.

    Raises:
        ValueError, OSError: `out` is nothing that `save_picture` writes.
    """
    check_picture(out, 6 * 4 * 32, 2 * 4 * 32)
    print(f"drawing {len(DEMO)} pictures, and again with the reference", file=sys.stderr)
    model = lumina.load(lumina.COMPACT)
    encoder = lumina.load_caption_encoder(lumina.COMPACT)
    prompts = [prompt for _, prompt in DEMO]
    features, negative = encoder(prompts), encoder([""])
    noise = torch.randn(len(DEMO), 3, 32, 32, generator=torch.Generator().manual_seed(seed % 2**64))
    settings = lumina.COMPACT_SETTINGS
    start = time.perf_counter()
    with progress(settings["steps"], "steps") as bar:
        result = lumina.sample(
            model, *features, *negative, size=(32, 32), latents=noise, **settings,
            callback=lambda *_: bar.update(),
        )  # fmt: skip
    seconds = time.perf_counter() - start
    expected = _reference_sample(model, features, negative, noise, **settings)
    difference = (result.latents - expected).abs().max()
    save_picture(result.latents, out, columns=6, scale=4, text="\n".join(prompts))
    for number, (language, prompt) in enumerate(DEMO):
        print(f"row {number // 6 + 1}, column {number % 6 + 1}  {language}  {prompt}")
    print(
        f"{out}: {len(DEMO)} pictures, {seconds:.1f} s, NFE {result.nfe}, "
        f"largest difference from the reference {difference:.1e} (pixels are -1..1)"
    )


@torch.inference_mode()
def _reference_sample(
    model,
    features,
    negative,
    noise: Tensor,
    steps: int,
    solver: str,
    schedule: str,
    guidance: float,
) -> Tensor:
    reference = NextDiT(model.config).eval()
    reference.load_state_dict(model.state_dict())
    empty = [z.expand(len(noise), *z.shape[1:]) for z in negative]

    def velocity(t: float, x: Tensor) -> Tensor:
        time = torch.full((len(x),), t)
        conditional, plain = reference(x, time, *features), reference(x, time, *empty)
        return plain + guidance * (conditional - plain)

    with progress(steps, "steps of the reference") as bar:
        grid = parse_schedule(schedule)(steps)
        return solve(velocity, noise, grid, solver, callback=lambda *_: bar.update())[0]
