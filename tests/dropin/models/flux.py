"""Streams of text and image that are joined in one attention: Flux and its kin."""

import diffusers
import torch
from torch import randn

from models.inputs import MASK, STEPS, TIMES, grid, image, text, video


def tokens():
    """What most of them take."""
    return {
        "hidden_states": randn(2, 16, 16),
        "encoder_hidden_states": text(),
        "timestep": TIMES,
        "img_ids": grid(1, 4, 4),
        "txt_ids": torch.zeros(7, 3),
    }


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=128,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 64, 4),
        "encoder_hidden_states": text(),
        "pooled_projections": randn(2, 32),
        "timestep": TIMES,
        "img_ids": grid(1, 8, 8),
        "txt_ids": torch.zeros(7, 3),
    }


def flux2():
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 16),
        "encoder_hidden_states": text(),
        "timestep": TIMES,
        "img_ids": grid(1, 4, 4, 1),
        "txt_ids": grid(1, 1, 1, 7),
        "guidance": torch.full((2,), 4.0),
    }


def flux3():
    model = diffusers.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=1,
        num_attention_heads=2, joint_attention_dim=32, timestep_channels=32,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 16),
        "encoder_hidden_states": text(),
        "timestep": TIMES,
        "img_ids": grid(1, 4, 4, 1),
        "txt_ids": grid(1, 1, 1, 7),
        "image_cond_hidden_states": randn(2, 4, 16),
        "image_cond_ids": grid(1, 2, 2, 1),
    }


def chroma():
    """Its mask has rows of queries too."""
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2,
        joint_attention_dim=32, approximator_num_channels=64, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    mask = torch.cat((MASK, torch.ones(2, 16, dtype=torch.bool)), 1)
    return model, tokens() | {"attention_mask": mask}


def chroma_float():
    """The mask of ones and zeros that its pipeline makes, which is added to the scores."""
    model, inputs = chroma()
    return model, inputs | {"attention_mask": inputs["attention_mask"].float()}


def bria():
    model = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2,
        joint_attention_dim=32,
    )  # fmt: skip
    return model, tokens()


def bria_fibo():
    model = diffusers.BriaFiboTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2,
        joint_attention_dim=32, text_encoder_dim=16,
    )  # fmt: skip
    return model, tokens() | {"text_encoder_layers": [text(16) for _ in range(2)]}


def ovis():
    model = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2,
        joint_attention_dim=32,
    )  # fmt: skip
    return model, tokens()


def longcat_image():
    model = diffusers.LongCatImageTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    return model, tokens()


def hunyuan_image():
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": image(16, 4),
        "timestep": STEPS.float(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
        "encoder_hidden_states_2": text(16),
        "encoder_attention_mask_2": MASK,
    }


def hunyuan_video(**how):
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32, **how,
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "timestep": STEPS,
        "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
        "pooled_projections": randn(2, 32),
        "guidance": torch.full((2,), 6144.0),
    }


def hunyuan_video_i2v():
    """The tokens of the first frame have a modulation of their own."""
    return hunyuan_video(image_condition_type="token_replace")


def hunyuan_video_framepack():
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32, has_image_proj=True,
        image_proj_dim=16, has_clean_x_embedder=True,
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "timestep": STEPS,
        "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
        "pooled_projections": randn(2, 32),
        "image_embeds": randn(2, 3, 16),
        "indices_latents": torch.arange(1, 3),
        "guidance": torch.full((2,), 6144.0),
        "latents_clean": video(frames=1),
        "indices_latents_clean": torch.zeros(1),
        "latents_history_2x": video(frames=2),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": video(frames=4),
        "indices_latents_history_4x": torch.arange(4),
    }


def hunyuan_video15():
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, num_layers=1, num_refiner_layers=1,
        text_embed_dim=32, text_embed_2_dim=16, image_embed_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": video(16, side=4),
        "timestep": STEPS.float(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
        "encoder_hidden_states_2": text(16),
        "encoder_attention_mask_2": MASK,
        "image_embeds": torch.zeros(2, 3, 16),  # none: these tokens are padding
    }


def hunyuan_video15_i2v():
    model, inputs = hunyuan_video15()
    return model, inputs | {"image_embeds": randn(2, 3, 16)}


def motif():
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, num_layers=1, num_single_layers=2,
        num_decoder_layers=1, text_embed_dim=32, image_embed_dim=16,
        enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "timestep": STEPS,
        "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
        "image_embeds": randn(2, 3, 16),
    }


BUILDERS = (
    flux, flux2, flux3, chroma, chroma_float, bria, bria_fibo, ovis, longcat_image, hunyuan_image,
    hunyuan_video, hunyuan_video_i2v, hunyuan_video_framepack, hunyuan_video15,
    hunyuan_video15_i2v, motif,
)  # fmt: skip
