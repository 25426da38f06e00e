"""What a patched block costs the host: narrow blocks of diffusers' networks on few tokens, on one
thread, patched against as they are.

On a CPU their time is that of the calls rather than that of the arithmetic.
"""

from inspect import signature

import torch
from torch import nn

from benchmarks.harness.case import Case, our_variants
from benchmarks.harness.shapes import CPU, CUDA
from benchmarks.models.bench_patched import compiled
from benchmarks.models.diffusers_networks import MODELS, network, patched

BLOCKS = {
    "flux": "transformer_blocks.0", "flux-single": "single_transformer_blocks.0",
    "lumina-next": "layers.0", "lumina-image-2": "layers.0", "z-image": "layers.0",
    "sd3.5": "transformer_blocks.0", "pixart": "transformer_blocks.0",
    "dit": "transformer_blocks.0",
}  # fmt: skip


def narrow(shape, model: str):
    """About 256 wide: 2 heads of 128, 3 of 96 or 4 of less."""
    H, ratio = {128: 2, 96: 3}.get(shape.K, 4), shape.H // shape.G
    sizes = {"D": H * shape.K, "H": H, "G": max(1, H // ratio), "F": 4 * H * shape.K}
    layers = 2 if model == "sd3.5" else 1  # whose last block is another
    return shape.but(model=model, **sizes, side=4, T=8, Y=64, layers=layers)


OF = {shape.model: shape for shape in MODELS}
NARROW = tuple(narrow(OF[model.removesuffix("-single")], model) for model in BLOCKS)
SHAPES = (
    *(shape.but(dtype="float32", quick=shape is NARROW[0], devices=CPU) for shape in NARROW),
    *(shape.but(quick=shape is NARROW[0], devices=CUDA) for shape in NARROW),
)
PEERS = ("lumina-compile",)
SLOW_TO_COMPILE = True  # left out of the quick report


def case(shape, device) -> Case:
    model, inputs = network(shape, device)
    path = BLOCKS[shape.model]
    block = model.get_submodule(path)
    return Case(
        inputs=inputs_of(block, model, inputs),
        ours={
            name: patched(model, name.removeprefix("lumina-")).get_submodule(path)
            for name in our_variants(device)
        },
        eager=block,
        peers={"lumina-compile": lambda: compiled(block)},
        model=True,
        threads=1,
    )


@torch.no_grad()
def inputs_of(block: nn.Module, model: nn.Module, inputs: dict) -> dict:
    """The arguments of a block in a forward of its model, by name."""
    found = {}

    def keep(_, args, kwargs):
        found.update(signature(block.forward).bind(*args, **kwargs).arguments)

    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    model(**inputs)
    hook.remove()
    return found


def test_patched_block(compare):
    compare(case)
