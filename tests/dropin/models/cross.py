"""Text through a cross attention, image models: PixArt, Sana and others."""

import diffusers
import torch
from torch import randn

from models.inputs import MASK, STEPS, image, text, video


def dit():
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, num_layers=2, sample_size=16)
    return model, {
        "hidden_states": image(side=16),
        "timestep": STEPS,
        "class_labels": torch.tensor([1, 5]),
    }


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, num_layers=2, cross_attention_dim=144, sample_size=16,
        caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": image(side=16),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": MASK,
    }


def sana(**how):
    model = diffusers.SanaTransformer2DModel(
        in_channels=16, out_channels=16, num_attention_heads=7, num_layers=1,
        num_cross_attention_heads=2, cross_attention_dim=224, caption_channels=32, mlp_ratio=1.0,
        sample_size=8, **how,
    )  # fmt: skip
    return model, {
        "hidden_states": image(16, 4),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        "encoder_attention_mask": MASK,
    }


def sana_sprint():
    model, inputs = sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return model, inputs | {"guidance": torch.full((2,), 4.5)}


def sana_video():
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, num_layers=1,
        num_cross_attention_heads=2, cross_attention_dim=224, caption_channels=32, mlp_ratio=1.0,
        sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        "encoder_attention_mask": MASK,
    }


def latte():
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=72, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=144, attention_bias=True, sample_size=8, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=32, video_length=2,
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "timestep": STEPS,
        "encoder_hidden_states": text(),
    }


def allegro():
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, num_layers=2, cross_attention_dim=192, sample_height=8,
        sample_width=8, sample_frames=2, caption_channels=32,
    )  # fmt: skip
    tables = tuple(randn(2, 32, 16).repeat(1, 1, 2) for _ in range(3))
    places = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4))
    return model, {
        "hidden_states": video(),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        "attention_mask": torch.ones(2, 2, 8, 8),
        "encoder_attention_mask": MASK,
        "image_rotary_emb": (tables, tuple(places.T[:, None])),
    }


def transformer_2d():
    """A stage of a U-Net."""
    model = diffusers.Transformer2DModel(
        num_attention_heads=2, in_channels=176, num_layers=2, norm_num_groups=8,
        cross_attention_dim=32,
    )  # fmt: skip
    return model, {"hidden_states": image(176, 4), "encoder_hidden_states": text()}


def dreamlite():
    model = diffusers.DreamLiteTransformer2DModel(
        num_attention_heads=2, in_channels=176, num_layers=1, norm_num_groups=8,
        cross_attention_dim=32,
    )  # fmt: skip
    return model, {"hidden_states": image(176, 4), "encoder_hidden_states": text()}


def transformer_temporal():
    model = diffusers.TransformerTemporalModel(
        num_attention_heads=2, in_channels=176, num_layers=2, norm_num_groups=8
    )
    return model, {"hidden_states": randn(6, 176, 2, 2), "num_frames": 3}


def prior():
    model = diffusers.PriorTransformer(
        num_attention_heads=2, num_layers=2, embedding_dim=128, num_embeddings=7
    )
    return model, {
        "hidden_states": randn(2, 128),
        "timestep": STEPS,
        "proj_embedding": randn(2, 128),
        "encoder_hidden_states": text(128),
        "attention_mask": MASK,
    }


BUILDERS = (
    dit, pixart, sana, sana_sprint, sana_video, latte, allegro, transformer_2d, dreamlite,
    transformer_temporal, prior,
)  # fmt: skip
