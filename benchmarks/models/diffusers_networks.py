"""Networks of diffusers with random weights, and inputs for them."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness.shapes import FLUX, LUMINA_2, LUMINA_NEXT, Z_IMAGE, Shape
from lumina_kernels.patching import patch

# Two layers of about half the width, which a CPU can run in a second; the head_dims are the real
# ones. The captions of Flux have no negative prompt.
XL = Shape("dit", D=1152, H=16, G=16, K=72, F=4608, side=32, layers=2)
MODELS = (
    LUMINA_NEXT.but(D=1152, H=16, G=4, F=3072, side=32, layers=2),
    LUMINA_2.but(D=1152, H=12, G=4, F=4608, side=32, layers=2),
    Z_IMAGE.but(D=1152, H=9, G=9, F=3072, side=32, layers=2),
    FLUX.but(D=1024, H=8, G=8, F=4096, side=32, layers=2, B=1),
    XL.but(model="sd3.5", H=18, G=18, K=64, layers=3),
    XL.but(model="pixart"),
    XL,
)
NEGATIVE = 32  # tokens of the second caption, the negative prompt


def network(shape, device: str) -> tuple[nn.Module, dict]:
    """The network `shape.model` of the shape's sizes, and keyword arguments of its forward.

    Gates, biases and norm weights are random too, so that every part of a layer contributes.
    """
    model, inputs = NETWORKS[shape.model](shape, shape.randn(device))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=0.3, std=0.3)
    if shape.model == "lumina-next":  # in its checkpoints image and text have the same queries
        for layer in model.layers:
            for name in ("to_q", "norm_q"):
                same = getattr(layer.attn1, name)
                if device == "cuda":  # where patch does not find it out by itself
                    setattr(layer.attn2, name, same)
                else:
                    getattr(layer.attn2, name).load_state_dict(same.state_dict())
    # Not with their own `to`, which warns that modules could have to stay in float32: none has.
    return nn.Module.to(model, device, getattr(torch, shape.dtype)).eval(), inputs


def patched(model: nn.Module, backend: str) -> nn.Module:
    """A patched copy of the modules, which shares the parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    patch(model, backend=backend)
    return model


def lumina_next(shape, randn: Callable):
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = LuminaNextDiT2DModel(
        hidden_size=shape.D, num_layers=shape.layers, num_attention_heads=shape.H,
        num_kv_heads=shape.G, cross_attention_dim=shape.Y,
    )  # fmt: skip
    hidden_states = image(shape, randn, 4)
    table = get_2d_rotary_pos_embed_lumina(shape.K, shape.side, shape.side)
    return model, {
        "hidden_states": hidden_states,
        "timestep": times(hidden_states),
        "encoder_hidden_states": text(shape, randn),
        "encoder_mask": text_mask(shape, hidden_states),
        "image_rotary_emb": table.to(hidden_states.device),
        "cross_attention_kwargs": {},
    }


def lumina2(shape, randn: Callable):
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        hidden_size=shape.D, num_layers=shape.layers, num_refiner_layers=1,
        num_attention_heads=shape.H, num_kv_heads=shape.G, cap_feat_dim=shape.Y,
    )  # fmt: skip
    hidden_states = image(shape, randn)
    return model, {
        "hidden_states": hidden_states,
        "timestep": times(hidden_states),
        "encoder_hidden_states": text(shape, randn),
        "encoder_attention_mask": text_mask(shape, hidden_states),
    }


def z_image(shape, randn: Callable):
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        dim=shape.D, n_layers=shape.layers, n_refiner_layers=1, n_heads=shape.H,
        n_kv_heads=shape.G, cap_feat_dim=shape.Y,
    )  # fmt: skip
    pictures = image(shape, randn)
    lengths = text_mask(shape, pictures).sum(1).tolist()
    return (
        model,
        {
            "t": times(pictures),
            "x": list(pictures[:, :, None]),  # one frame
            "cap_feats": [rows[:n] for rows, n in zip(text(shape, randn), lengths, strict=True)],
        },
    )


def flux(shape, randn: Callable):
    """As many blocks of two streams as of one."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=shape.layers, num_single_layers=shape.layers, num_attention_heads=shape.H,
        joint_attention_dim=shape.Y,
    )  # fmt: skip
    hidden_states = randn(shape.B, shape.L, 64)
    axis = torch.arange(shape.side, device=hidden_states.device)
    return model, {
        "hidden_states": hidden_states,
        "encoder_hidden_states": text(shape, randn),
        "pooled_projections": randn(shape.B, 768),
        "timestep": times(hidden_states),
        "img_ids": torch.cartesian_prod(axis[:1], axis, axis).to(hidden_states.dtype),
        "txt_ids": hidden_states.new_zeros(shape.T, 3),
    }


def sd35(shape, randn: Callable):
    """As Stable Diffusion 3.5 medium: the first block has a second attention, to the image."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        num_layers=shape.layers, num_attention_heads=shape.H, joint_attention_dim=shape.Y,
        caption_projection_dim=shape.D, pos_embed_max_size=shape.side, sample_size=2 * shape.side,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    hidden_states = image(shape, randn)
    return model, {
        "hidden_states": hidden_states,
        "encoder_hidden_states": text(shape, randn),
        "pooled_projections": randn(shape.B, 2048),
        "timestep": times(hidden_states),
    }


def pixart(shape, randn: Callable):
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=shape.H, num_layers=shape.layers, cross_attention_dim=shape.D,
        sample_size=2 * shape.side, caption_channels=shape.Y, use_additional_conditions=False,
    )  # fmt: skip
    hidden_states = image(shape, randn, 4)
    return model, {
        "hidden_states": hidden_states,
        "encoder_hidden_states": text(shape, randn),
        "timestep": steps(hidden_states),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": text_mask(shape, hidden_states),
    }


def dit(shape, randn: Callable):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=shape.H, num_layers=shape.layers, sample_size=2 * shape.side
    )
    hidden_states = image(shape, randn, 4)
    labels = torch.arange(1, 1 + shape.B, device=hidden_states.device)
    return model, {
        "hidden_states": hidden_states,
        "timestep": steps(hidden_states),
        "class_labels": labels,
    }


def image(shape, randn: Callable, channels: int = 16) -> Tensor:
    return randn(shape.B, channels, 2 * shape.side, 2 * shape.side)


def text(shape, randn: Callable) -> Tensor:
    return randn(shape.B, shape.T, shape.Y)


def text_mask(shape, like: Tensor) -> Tensor:
    """All tokens of the first caption, the first NEGATIVE of the others."""
    lengths = torch.tensor([shape.T] + [min(NEGATIVE, shape.T)] * (shape.B - 1))
    return (torch.arange(shape.T) < lengths[:, None]).to(like.device)


def times(like: Tensor) -> Tensor:
    return torch.full((len(like),), 0.5, device=like.device, dtype=like.dtype)


def steps(like: Tensor) -> Tensor:
    return torch.full((len(like),), 500, device=like.device)


NETWORKS = {
    "lumina-next": lumina_next, "lumina-image-2": lumina2, "z-image": z_image, "flux": flux,
    "flux-single": flux, "sd3.5": sd35, "pixart": pixart, "dit": dit,
}  # fmt: skip
