"""One layer of Lumina-Next: modulation, self-attention with its text branch, feed-forward."""

import torch
from torch import nn

from benchmarks.measure import Case, our_variants
from benchmarks.networks import on_backend, our_network, users_network
from benchmarks.shapes import CPU, CUDA, LUMINA_NEXT, QUARTER
from lumina.models.next_dit.flops import forward_flops
from lumina.models.parts.rope import positions, rope_axes, rope_frequencies
from lumina_kernels import norm_modulate, sandwich_norm, sandwich_norm_chain

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
    """What `lumina.NextDiT.velocity` does for a layer, between two norms that it shares with its
    neighbours."""

    def __init__(self, network, side: int, device: str):
        super().__init__()
        self.layer, self.backend, K = network.layers[0], network.backend, network.config.head_dim
        axes = ("h", "w")
        self.rope = (
            positions(1, side, side, device),
            rope_frequencies(K, axes, 10000.0, device=device),
            rope_axes(K, axes, device=device),
        )

    def forward(self, h, c, text, text_mask):
        layer, backend = self.layer, self.backend
        scale, gate, ffn_scale, ffn_gate = layer.adaLN_modulation(nn.functional.silu(c)).chunk(4, 1)
        pre = norm_modulate(h, layer.attention_norm1.weight, scale=scale, backend=backend)
        keys_and_values = (*layer.text_kv(text), text_mask)
        out = layer.attention(pre, self.rope, None, None, keys_and_values, None)
        h, pre = sandwich_norm_chain(
            out, h, layer.attention_norm2.weight, gate, layer.ffn_norm1.weight, ffn_scale,
            backend=backend,
        )  # fmt: skip
        out = layer.feed_forward(pre)
        return sandwich_norm(out, h, layer.ffn_norm2.weight, ffn_gate, backend=backend)


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
        info={"": {"eager is": baseline}},
    )


def users_block(model, side: int, device: str):
    """diffusers' block with the same parameters; the definition of ours where it is not there."""
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
