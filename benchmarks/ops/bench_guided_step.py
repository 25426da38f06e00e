"""guided_step: classifier-free guidance of 3 of the 4 channels, as in Lumina-Next's pipeline, and
an Euler step."""

import torch

import lumina_kernels as lk
from benchmarks.harness.case import Case, ours
from benchmarks.harness.shapes import CPU, CUDA, LUMINA_NEXT, QUARTER

# Latents have the same sizes in every model.
SHAPES = (
    QUARTER.but(side=32, quick=True, devices=CPU),
    LUMINA_NEXT.but(quick=True, devices=CUDA),
    LUMINA_NEXT.but(devices=CPU),
    LUMINA_NEXT.but(dtype="float32", devices=CPU),
    LUMINA_NEXT.but(side=16),
    LUMINA_NEXT.but(side=32, devices=CUDA),
    LUMINA_NEXT.but(side=128),
)
PEERS = ()
WEIGHT, DT, CHANNELS = 4.0, 0.125, 3


def case(shape, device) -> Case:
    size, randn = 2 * shape.side, shape.randn(device)
    x, v = randn(1, 4, size, size), randn(2, 4, size, size)

    def eager(x, v):
        cond, uncond = v[:, :CHANNELS].chunk(2)
        guided = uncond + WEIGHT * (cond - uncond)
        u = torch.cat((guided, v[:1, CHANNELS:]), 1)
        return x + DT * u

    return Case(
        inputs={"x": x, "v": v},
        ours=ours(lk.guided_step, device, weight=WEIGHT, dt=DT, channels=CHANNELS),
        eager=eager,
        bytes=4 * x.nbytes,  # x, the two velocities and the new x
    )


def test_guided_step(compare):
    compare(case)
