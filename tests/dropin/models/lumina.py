"""RMSNorm sandwiches and tanh gates: the Lumina family and its kin."""

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import randn

from models.inputs import MASK, STEPS, TIMES, image, text, video


def lumina_next():
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16, in_channels=4, hidden_size=288, num_layers=2, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, cross_attention_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": image(side=16),
        "timestep": TIMES,
        "encoder_hidden_states": text(),
        "encoder_mask": MASK,
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(72, 384, 384),
        "cross_attention_kwargs": {},
    }


def lumina_next_shared():
    """One query for image and text, as converted checkpoints have, and proportional attention."""
    model, inputs = lumina_next()
    for layer in model.layers:
        layer.attn2.to_q, layer.attn2.norm_q = layer.attn1.to_q, layer.attn1.norm_q
    return model, inputs | {"cross_attention_kwargs": {"base_sequence_length": 16}}


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=192, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, cap_feat_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": image(side=16),
        "timestep": TIMES,
        "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
    }


def z_image(**how):
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=32, **how,
    )  # fmt: skip
    return model, {
        "x": [randn(4, 1, 16, 16) for _ in range(2)],
        "t": TIMES,
        "cap_feats": [randn(n, 32) for n in (7, 40)],
    }


def z_image_omni():
    """From another image: tokens have the modulation of a noisy or of a clean image."""
    model, inputs = z_image(siglip_feat_dim=16)
    return model, inputs | {
        "x": [[randn(4, 1, 8, 8), randn(4, 1, 8, 8)] for _ in range(2)],
        "cap_feats": [[randn(n, 32), randn(3, 32)] for n in (7, 40)],
        "siglip_feats": [[randn(2, 2, 16), None] for _ in range(2)],
        "image_noise_mask": [[0, 1]] * 2,
    }


def bria_fibo2():
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=32,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4,
        max_num_gist_tokens=8, gist_step=2, gist_min_text_len=4, gist_max_text_len=7,
    )  # fmt: skip
    return model, {
        "hidden_states": image(),
        "timestep": TIMES,
        "encoder_hidden_states": randn(2, 2, 7, 32),
        "encoder_attention_mask": MASK,
    }


def bria_fibo2_edit():
    """With another image as context, which has a modulation of its own."""
    model, inputs = bria_fibo2()
    return model, inputs | {"context_latents": [image()]}


def ideogram4():
    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=16, num_layers=2, num_attention_heads=2, intermediate_size=64, adaln_dim=32,
        llm_features_dim=32,
    )  # fmt: skip
    sequence = torch.arange(23)
    return model, {  # 7 of text, 16 of image, one sample shorter by a segment of its own
        "hidden_states": randn(2, 23, 16),
        "timestep": TIMES,
        "encoder_hidden_states": randn(2, 23, 32),
        "position_ids": sequence.view(1, -1, 1).expand(2, -1, 3),
        "segment_ids": torch.stack((sequence * 0, (sequence < 3).long())),
        "indicator": torch.where(sequence < 7, 3, 2).expand(2, -1),
    }


def mochi():
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, num_layers=2, pooled_projection_dim=64, in_channels=4,
        text_embed_dim=32, time_embed_dim=32, max_sequence_length=7,
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "timestep": STEPS,
        "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
    }


def nucleus():
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, num_attention_heads=4, num_key_value_heads=2,
        joint_attention_dim=32, num_experts=4, moe_intermediate_dim=32, capacity_factors=2.0,
        dense_moe_strategy="leave_first_block_dense",
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 16),
        "img_shapes": [(1, 4, 4)] * 2,
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": MASK,
        "timestep": TIMES,
    }


BUILDERS = (
    lumina_next, lumina_next_shared, lumina2, z_image, z_image_omni, bria_fibo2, bria_fibo2_edit,
    ideogram4, mochi, nucleus,
)  # fmt: skip
