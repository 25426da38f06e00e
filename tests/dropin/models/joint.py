"""Text and image in one attention, image models: SD3, Qwen-Image, CogView and others."""

import diffusers
import torch
from torch import randn

from models.inputs import MASK, STEPS, TIMES, grid, image, text

CROP = {
    "original_size": torch.tensor([[64.0, 64.0]] * 2),
    "target_size": torch.tensor([[64.0, 64.0]] * 2),
    "crop_coords": torch.tensor([[0.0, 0.0]] * 2),
}


def sd3(**how):
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, in_channels=4, num_layers=3, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=128, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16,
        **how,
    )  # fmt: skip
    return model, {
        "hidden_states": image(side=16),
        "encoder_hidden_states": text(),
        "pooled_projections": randn(2, 32),
        "timestep": TIMES,
    }


def sd35():
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def qwen_image(**how):
    """Padded text stands before the image: its mask has a hole."""
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, num_attention_heads=2, joint_attention_dim=32,
        **how,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 64, 16),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": MASK,
        "timestep": TIMES,
        "img_shapes": [[(1, 8, 8)]] * 2,
    }


def qwen_image_edit():
    """Each token has the modulation of one of two timesteps."""
    model, inputs = qwen_image(zero_cond_t=True)
    return model, inputs | {"img_shapes": [[(1, 4, 8), (1, 4, 8)]] * 2}


def qwen_image21():
    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2, context_in_dim=32,
        mlp_ratio=1,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 16),
        "encoder_hidden_states": text(),
        "timestep": TIMES,
        "img_shapes": [[(1, 4, 4)]] * 2,
        "img_mask": (torch.arange(11) >= 7).expand(2, -1),  # a slot has four tokens
        "encoder_hidden_states_mask": MASK,
    }


def aura_flow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=512, pos_embed_max_size=16,
    )  # fmt: skip
    return model, {
        "hidden_states": image(),
        "encoder_hidden_states": text(),
        "timestep": TIMES,
    }


def hidream():
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        num_attention_heads=2, caption_channels=[32, 32], text_emb_dim=32,
        axes_dims_rope=(64, 32, 32), max_resolution=(16, 16), llama_layers=[0, 1],
    )  # fmt: skip
    return model, {
        "hidden_states": image(side=16),
        "timesteps": STEPS,
        "encoder_hidden_states_t5": text(),
        "encoder_hidden_states_llama3": randn(2, 2, 7, 32),
        "pooled_embeds": randn(2, 32),
    }


def hidream_wide():
    """An image that is not square is padded to the largest, and has a mask."""
    model, inputs = hidream()
    return model, inputs | {"hidden_states": randn(2, 4, 12, 16)}


def cogview3():
    model = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, num_layers=2, num_attention_heads=2, out_channels=4, text_embed_dim=32,
        time_embed_dim=32, condition_dim=16, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": image(),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        **CROP,
    }


def cogview4():
    """The mask of the text is added to the scores as ones and zeros."""
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=128, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=32, condition_dim=16, sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": image(),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        **CROP,
        "attention_mask": MASK,
    }


def glm_image():
    model = diffusers.GlmImageTransformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=128, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=32, condition_dim=16, prior_vq_quantizer_codebook_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": image(),
        "encoder_hidden_states": text(),
        "prior_token_id": torch.arange(16).expand(2, -1) % 8,
        "prior_token_drop": torch.tensor([[False], [True]]).expand(-1, 16),
        "timestep": STEPS,
        "target_size": torch.tensor([[64.0, 64.0]] * 2),
        "crop_coords": torch.tensor([[0.0, 0.0]] * 2),
        "attention_mask": MASK,
    }


def krea2():
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=32, text_hidden_dim=256, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 16),
        "encoder_hidden_states": randn(2, 7, 3, 256),
        "timestep": TIMES,
        "position_ids": torch.cat((torch.zeros(7, 3), grid(1, 4, 4))),
        "encoder_attention_mask": MASK,
    }


def ernie_image():
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=256, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16,
        out_channels=16, text_in_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": image(16, 4),
        "timestep": STEPS,
        "text_bth": text(),
        "text_lens": torch.tensor([7, 4]),
    }


def prx():
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=32, hidden_size=128, mlp_ratio=1, num_heads=2, depth=2,
        axes_dim=[32, 32],
    )  # fmt: skip
    return model, {
        "hidden_states": image(),
        "timestep": TIMES,
        "encoder_hidden_states": text(),
        "attention_mask": MASK,
    }


def omnigen():
    """Padded on the left, and causal but for the image."""
    model = diffusers.OmniGenTransformer2DModel(
        hidden_size=192, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        num_layers=2, pad_token_id=0, vocab_size=16, pos_embed_max_size=8, time_step_dim=32,
        rope_scaling={"short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    )  # fmt: skip
    causal = torch.ones(24, 24).tril().bool() | (torch.arange(24) >= 8)
    valid = torch.arange(24) >= torch.tensor([[0], [3]])
    return model, {
        "hidden_states": image(),
        "timestep": TIMES,
        "input_ids": torch.arange(14).view(2, 7),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": (causal & valid[:, None]).long(),
        "position_ids": (torch.arange(24) - torch.tensor([[0], [3]])).clamp(0),
    }


def hunyuan_dit():
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, in_channels=4, patch_size=2, sample_size=8, hidden_size=176,
        num_layers=4, mlp_ratio=1.0, cross_attention_dim=32, cross_attention_dim_t5=16,
        pooled_projection_dim=16, text_len=7, text_len_t5=7,
    )  # fmt: skip
    return model, {
        "hidden_states": image(),
        "timestep": STEPS.float(),
        "encoder_hidden_states": text(),
        "text_embedding_mask": MASK,
        "encoder_hidden_states_t5": text(16),
        "text_embedding_mask_t5": MASK,
        "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]] * 2),
        "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": tuple(randn(2, 16, 88)),
    }


def hunyuan_dit_control():
    model = diffusers.HunyuanDiT2DControlNetModel(
        num_attention_heads=2, in_channels=4, patch_size=2, sample_size=8, hidden_size=176,
        transformer_num_layers=4, mlp_ratio=1.0, cross_attention_dim=32, cross_attention_dim_t5=16,
        pooled_projection_dim=16, text_len=7, text_len_t5=7,
    )  # fmt: skip
    return model, hunyuan_dit()[1] | {"controlnet_cond": image()}


BUILDERS = (
    sd3, sd35, qwen_image, qwen_image_edit, qwen_image21, aura_flow, hidream, hidream_wide,
    cogview3, cogview4, glm_image, krea2, ernie_image, prx, omnigen, hunyuan_dit,
    hunyuan_dit_control,
)  # fmt: skip
