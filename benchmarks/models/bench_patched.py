"""Networks of diffusers, patched against as they are: one evaluation.

"lumina-compile" is `torch.compile` with this package's backend.
"""

import torch

from benchmarks.harness.case import Case, our_variants
from benchmarks.harness.shapes import CPU
from benchmarks.models.diffusers_networks import MODELS, network, patched
from lumina_kernels.patching import compile_backend

LONG = ("lumina-next", "lumina-image-2", "flux", "pixart")  # measured with 4096 tokens, too
SHAPES = (
    MODELS[0].but(side=16, layers=1, quick=True),
    *MODELS,
    *(shape.but(side=64, B=1) for shape in MODELS if shape.model in LONG),
    *(shape.but(dtype="float32", devices=CPU) for shape in MODELS),
    *(
        shape.but(side=64, B=1, dtype="float32", devices=CPU)
        for shape in MODELS
        if shape.model in LONG
    ),
)
PEERS = ("lumina-compile",)
SLOW_TO_COMPILE = True  # left out of the quick report


def case(shape, device) -> Case:
    model, inputs = network(shape, device)
    eager = forward(model)
    return Case(
        inputs=inputs,
        ours={
            name: forward(patched(model, name.removeprefix("lumina-")))
            for name in our_variants(device)
        },
        eager=eager,
        peers={"lumina-compile": lambda: compiled(eager)},
        model=True,
    )


def forward(model):
    return lambda **inputs: model(**inputs, return_dict=False)[0]


def compiled(function):
    """`torch.compile(function, backend="lumina_kernels")`, which needs the installed package."""
    return torch.compile(function, backend=compile_backend, dynamic=False)


def test_patched(compare):
    compare(case)
