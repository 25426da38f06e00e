"""Small random diffusion transformers of diffusers, with the head_dims of the released ones."""

from collections.abc import Callable
from functools import partial

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import nn

CAPTION = torch.arange(2 * 7).view(2, 7) % 7 < torch.tensor([[7], [4]])


def _lumina_next():
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16, in_channels=4, hidden_size=288, num_layers=2, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, cross_attention_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_mask": CAPTION,
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(72, 384, 384),
        "cross_attention_kwargs": {},
    }


def _lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=192, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, cap_feat_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_attention_mask": CAPTION,
    }


def _z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=32,
    )  # fmt: skip
    return model, {
        "x": [torch.randn(4, 1, 16, 16) for _ in range(2)],
        "t": torch.rand(2),
        "cap_feats": [torch.randn(n, 32) for n in (7, 40)],
    }


def _flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=128,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(8.0), torch.arange(8.0)), -1)
    return model, {
        "hidden_states": torch.randn(2, 64, 4),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.rand(2),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def _sd35():
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, in_channels=4, num_layers=3, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=128, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.rand(2),
    }


def _pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, num_layers=2, cross_attention_dim=144, sample_size=16,
        caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([3, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": CAPTION,
    }


def _dit():
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, num_layers=2, sample_size=16)
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([1, 5]),
    }


def _qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, num_attention_heads=2, joint_attention_dim=32
    )
    return model, {
        "hidden_states": torch.randn(2, 64, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_hidden_states_mask": CAPTION,
        "timestep": torch.rand(2),
        "img_shapes": [[(1, 8, 8)]] * 2,
    }


def _wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, in_channels=4, out_channels=4, text_dim=32, ffn_dim=64, num_layers=2
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 7, 32),
    }


def _hidream():
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        num_attention_heads=2, caption_channels=[32, 32], text_emb_dim=32,
        axes_dims_rope=(64, 32, 32), max_resolution=(16, 16), llama_layers=[0, 1],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timesteps": torch.tensor([3, 700]),
        "encoder_hidden_states_t5": torch.randn(2, 7, 32),
        "encoder_hidden_states_llama3": torch.randn(2, 2, 7, 32),
        "pooled_embeds": torch.randn(2, 32),
    }


MODELS: dict[str, Callable] = {
    "lumina_next": _lumina_next,
    "lumina2": _lumina2,
    "z_image": _z_image,
    "flux": _flux,
    "sd35": _sd35,
    "pixart": _pixart,
    "dit": _dit,
    "qwen_image": _qwen_image,
    "wan": _wan,
    "hidream": _hidream,
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, dict]:
    """A model in eval mode whose parameters are all random, also those that begin as 0 or 1, and
    inputs for it."""
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=0.3, std=0.3)
    return model.eval(), inputs


def cast(inputs, dtype: torch.dtype):
    """Inputs with their floating tensors in a dtype, but for tables."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {k: x if k.endswith("_ids") else cast(x, dtype) for k, x in inputs.items()}
    return type(inputs)(map(partial(cast, dtype=dtype), inputs)) if isinstance(inputs, list) else inputs
