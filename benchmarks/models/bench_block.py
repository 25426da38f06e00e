"""One layer of Lumina-Next: modulation, self-attention with its text branch, feed-forward."""

import torch
from torch import nn

from benchmarks.harness.case import Case, our_variants
from benchmarks.harness.shapes import CPU, CUDA, LUMINA_NEXT, QUARTER
from benchmarks.models.networks import on_backend, our_network, users_network
from lumina.models.flops import forward_flops
from lumina.models.parts.geometry import Geometry
from lumina.models.parts.norms import residual_sum
from lumina.models.parts.rope import positions, rope_axes, rope_frequencies

SHAPES = (
    QUARTER.but(side=32, quick=True, devices=CPU),
    LUMINA_NEXT.but(quick=True, devices=CUDA),
    LUMINA_NEXT.but(side=16),
    LUMINA_NEXT.but(side=32),
    LUMINA_NEXT.but(devices=CPU),
    LUMINA_NEXT.but(side=128, devices=CUDA),
)
PEERS = ()


class Block(nn.Module):
    """The first block of a network, and the sum that the norm of the next block would fuse."""

    def __init__(self, network, side: int, device: str):
        super().__init__()
        self.block, self.backend, K = network.layers[0], network.backend, network.config.head_dim
        axes = ("h", "w")
        rope = (
            positions(1, side, side, device),
            rope_frequencies(K, axes, 10000.0, device=device),
            rope_axes(K, axes, device=device),
        )
        self.geometry = Geometry(rope, key_mask=None, key_scale=None)

    def forward(self, h, c, text, text_mask):
        c = nn.functional.silu(c)
        carry = self.block(text, text_mask, h, c=c, geometry=self.geometry)
        return residual_sum(carry, self.block.eps, self.backend)


def case(shape, device) -> Case:
    B, L, T, side, randn = shape.B, shape.L, shape.T, shape.side, shape.randn(device)
    model = our_network(shape, device)
    baseline, users = users_block(model, side, device)
    size = (2 * side, 2 * side)
    one, two = (
        forward_flops(our_network(shape.but(layers=n), "meta").config, size, T) for n in (1, 2)
    )
    return Case(
        inputs={
            "h": randn(B, L, shape.D),
            "c": randn(B, model.config.cond_dim),
            "text": randn(B, T, shape.Y),
            "text_mask": torch.ones(B, T, dtype=torch.bool, device=device),
        },
        ours={
            name: Block(on_backend(model, name.removeprefix("lumina-")), side, device)
            for name in our_variants(device)
        },
        eager=users,
        flops=B * (two - one),
        model=True,
        info={"eager is": baseline},
    )


def users_block(model, side: int, device: str):
    """diffusers' block with the same parameters, or the definitions of our ops where diffusers is
    not installed."""
    name, network = users_network(model)
    if name != "diffusers":
        return "lumina_kernels' definitions", Block(on_backend(model, "torch"), side, device)
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    block, K = network.layers[0], model.config.head_dim
    table = get_2d_rotary_pos_embed_lumina(K, side, side).flatten(0, 1)[None].to(device)
    mask = torch.ones(1, side * side, dtype=torch.bool, device=device)

    def forward(h, c, text, text_mask):
        return block(h, mask.expand(len(h), -1), table, text, text_mask, c, {})

    return name, forward


def test_block(compare):
    compare(case)
