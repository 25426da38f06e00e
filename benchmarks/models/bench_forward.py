"""Whole networks: one evaluation of the velocity, which projects the captions as well."""

import torch

from benchmarks.harness.case import Case, our_variants
from benchmarks.harness.shapes import CPU, CUDA, LUMINA_NEXT, QUARTER
from benchmarks.models.networks import on_backend, our_network, users_forward
from lumina import ContextDrop
from lumina.models.flops import forward_flops

SHAPES = (
    QUARTER.but(layers=2, side=32, quick=True, devices=CPU),
    QUARTER.but(layers=2, side=16, quick=True, devices=CPU),
    LUMINA_NEXT.but(layers=24, quick=True, devices=CUDA),
    QUARTER.but(layers=8, side=32, devices=CPU),
    QUARTER.but(layers=8, devices=CPU),
    QUARTER.but(layers=8, side=32, dtype="float32", devices=CPU),
    QUARTER.but(layers=8, dtype="float32", devices=CPU),
    QUARTER.but(layers=2, devices=CPU),
    LUMINA_NEXT.but(layers=24, side=16),
    LUMINA_NEXT.but(layers=24, side=32, devices=CUDA),
    LUMINA_NEXT.but(layers=24, side=128, devices=CUDA),
    QUARTER.but(layers=2, side=128, devices=CPU),
)
# Ours with 2 x 2 context drop in all layers, as at t = 0. It computes something else.
PEERS = ("lumina-drop2",)


def case(shape, device) -> Case:
    B, T, size, randn = shape.B, shape.T, 2 * shape.side, shape.randn(device)
    model = our_network(shape, device)
    baseline, users = users_forward(model, shape.side, device)
    drop = ContextDrop(2).at(0.0, shape.layers)
    return Case(
        inputs={
            "x": randn(B, 4, size, size),
            "t": torch.rand(B, device=device),
            "cap_feats": randn(B, T, shape.Y),
            "cap_mask": torch.ones(B, T, dtype=torch.bool, device=device),
        },
        ours={
            name: on_backend(model, name.removeprefix("lumina-")) for name in our_variants(device)
        },
        eager=users,
        peers={"lumina-drop2": lambda: lambda **inputs: model(**inputs, context_drop=drop)},
        not_equivalent=("lumina-drop2",),
        flops=B * forward_flops(model.config, (size, size), T),
        model=True,
        info={"eager is": baseline},
    )


def test_forward(compare):
    compare(case)
