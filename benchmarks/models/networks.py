"""Whole networks with the same weights: ours, and the baseline that users run today."""

from collections.abc import Callable

import torch
from torch import nn

import lumina
from lumina import reference
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.next_dit.diffusers import CONFIG, names


def our_network(shape, device: str, backend: str | None = None) -> lumina.NextDiT:
    """A Next-DiT of the shape's sizes with random weights.

    Gates, biases and norm weights are around 1/2, so that every part of a layer contributes.
    """
    config = NextDiTConfig(
        dim=shape.D, n_layers=shape.layers, n_heads=shape.H, n_kv_heads=shape.G,
        cap_feat_dim=shape.Y,
    )  # fmt: skip
    with torch.device("meta"):
        model = lumina.NextDiT(config, backend).to(getattr(torch, shape.dtype))
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.02)
    return model


def on_backend(model: lumina.NextDiT, backend: str) -> lumina.NextDiT:
    """The network with all ops on another backend; the parameters are shared."""
    with torch.device("meta"):
        other = lumina.NextDiT(model.config, backend).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def users_network(model: lumina.NextDiT) -> tuple[str, nn.Module]:
    """The baseline's name and network, which shares the parameters of `model`: diffusers'
    LuminaNextDiT2DModel, or `lumina.reference` where diffusers is not installed."""
    try:
        from diffusers import LuminaNextDiT2DModel
    except ImportError:
        with torch.device("meta"):
            theirs = reference.NextDiT(model.config)
        theirs.load_state_dict(model.state_dict(), assign=True)
        return "lumina.reference", theirs.eval()
    with torch.device("meta"):
        theirs = LuminaNextDiT2DModel(
            **{name: getattr(model.config, ours) for name, (ours, _) in CONFIG.items()}
        )
    state = {copy: z for name, z in model.state_dict().items() for copy in names(name)}
    theirs.load_state_dict(state, assign=True)
    return "diffusers", theirs.eval()


def users_forward(model: lumina.NextDiT, side: int, device: str) -> tuple[str, Callable]:
    """The baseline's name, and `users_network` as a function (x, t, cap_feats, cap_mask) ->
    velocity."""
    name, theirs = users_network(model)
    if name != "diffusers":
        return name, theirs
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    # The pipeline computes this table once for all steps.
    table = get_2d_rotary_pos_embed_lumina(model.config.head_dim, 384, 384).to(device)

    def forward(x, t, cap_feats, cap_mask):
        out = theirs(
            x, t.to(x.dtype), cap_feats, cap_mask, image_rotary_emb=table,
            cross_attention_kwargs={}, return_dict=False,
        )[0]  # fmt: skip
        return out.chunk(2, 1)[0]  # the second half is a learned sigma, which nothing uses

    return name, forward
