"""Videos: CogVideoX, LTX, Cosmos, Kandinsky and others."""

import diffusers
import torch
from torch import randn

from models.inputs import MASK, STEPS, TIMES, grid, text, video


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, in_channels=4, out_channels=4, time_embed_dim=32, text_embed_dim=32,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 2, 4, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        "image_rotary_emb": tuple(randn(2, 32, 64)),
    }


def consisid():
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, in_channels=4, out_channels=4, time_embed_dim=32, text_embed_dim=32,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=7,
        use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_dim_head=16,
        cross_attn_num_heads=2, LFE_id_dim=32, LFE_vit_dim=32, LFE_depth=2, LFE_dim_head=16,
        LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=4, LFE_output_dim=85, LFE_ff_mult=1,
        LFE_num_scale=2,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 2, 4, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        "image_rotary_emb": tuple(randn(2, 32, 64)),
        "id_cond": randn(2, 32),
        "id_vit_hidden": [randn(2, 3, 32) for _ in range(2)],
    }


def easyanimate():
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
        sample_height=8, num_layers=2, mmdit_layers=1, time_embed_dim=32, text_embed_dim=32,
        add_norm_text_encoder=True, time_position_encoding_type="3d_rope",
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "timestep": STEPS,
        "encoder_hidden_states": text(),
    }


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, cross_attention_dim=128, num_layers=2,
        caption_channels=32,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 32, 4),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        "encoder_attention_mask": MASK,
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def ltx_tokens():
    """Each token has a timestep of its own."""
    model, inputs = ltx()
    return model, inputs | {"timestep": STEPS.repeat_interleave(16).expand(2, -1)}


def ltx2(**how):
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, cross_attention_dim=256,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_cross_attention_dim=128, num_layers=1, caption_channels=32, **how,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 32, 4),
        "audio_hidden_states": randn(2, 5, 4),
        "encoder_hidden_states": text(),
        "audio_encoder_hidden_states": text(),
        "timestep": STEPS[:, None].expand(-1, 32),
        "audio_timestep": STEPS[:, None].expand(-1, 5),
        "sigma": TIMES,
        "encoder_attention_mask": MASK,
        "audio_encoder_attention_mask": MASK,
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 5,
    }


def ltx23():
    """Heads have gates, and the text a modulation; halves are rotated."""
    how = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod")
    return ltx2(rope_type="split", **dict.fromkeys(how, True))


def sana_wm_refiner():
    model = diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, cross_attention_dim=256,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_cross_attention_dim=128, num_layers=1, caption_channels=32,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 32, 4),
        "encoder_hidden_states": text(),
        "timestep": STEPS[:, None].expand(-1, 32),
        "video_rotary_emb": tuple(randn(2, 2, 32, 128).repeat_interleave(2, -1)),
        "encoder_attention_mask": MASK,
    }


def cosmos(**how):
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, num_layers=2, mlp_ratio=1.0,
        text_embed_dim=32, adaln_lora_dim=16, max_size=(4, 8, 8), concat_padding_mask=False, **how,
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "timestep": TIMES,
        "encoder_hidden_states": text(),
        "attention_mask": MASK,
    }


def cosmos_frames():
    """Each frame has a timestep of its own."""
    model, inputs = cosmos(extra_pos_embed_type=None)
    return model, inputs | {"timestep": TIMES.expand(2, -1).reshape(2, 1, 2, 1, 1)}


def cosmos3():
    """A text model and a diffusion transformer side by side, on packed sequences."""
    model = diffusers.Cosmos3OmniTransformer(
        hidden_size=256, intermediate_size=64, latent_channel=4, num_attention_heads=4,
        num_hidden_layers=2, num_key_value_heads=2, patch_latent_dim=16, vocab_size=16, head_dim=64,
        rope_axes_dim=[12, 10, 10],
    )  # fmt: skip
    places = torch.arange(23)
    return model, {
        "input_ids": places[:7],
        "text_indexes": places[:7],
        "position_ids": torch.cat((places[:7].view(1, -1).expand(3, -1), grid(1, 4, 4).T + 7), 1),
        "und_len": 7,
        "sequence_length": 23,
        "vision_tokens": [randn(1, 4, 1, 8, 8)],
        "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": places[7:],
        "vision_mse_loss_indexes": places[7:],
        "vision_timesteps": torch.full((16,), 700.0),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def kandinsky5():
    model = diffusers.Kandinsky5Transformer3DModel(
        in_text_dim=32, in_text_dim2=16, time_dim=32, model_dim=128, ff_dim=64, num_text_blocks=1,
        num_visual_blocks=2, visual_cond=True,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 2, 8, 8, 9),
        "encoder_hidden_states": text(),
        "timestep": STEPS,
        "pooled_projections": randn(2, 16),
        "visual_rope_pos": [torch.arange(n) for n in (2, 4, 4)],
        "text_rope_pos": torch.arange(7),
    }


def kandinsky6():
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=32,
        model_dim=256, ff_dim=64, num_text_blocks=1, num_visual_blocks=1, visual_cond=False,
        in_audio_dim=4, out_audio_dim=4, ca_rope=True, cross_gates=True,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 2, 8, 8, 4),
        "encoder_hidden_states": text(),
        "pooled_projections": randn(2, 16),
        "timestep": STEPS,
        "audio_hidden_states": randn(2, 5, 4),
        "encoder_attention_mask": MASK,
    }


def kandinsky6_sr():
    model = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=4, time_dim=32, model_dim=128, ff_dim=64,
        num_visual_blocks=1,
    )  # fmt: skip
    return model, {"hidden_states": randn(2, 2, 16, 16, 9), "timestep": STEPS}


def joy_image():
    model = diffusers.JoyImageEditTransformer3DModel(
        in_channels=4, hidden_size=256, num_attention_heads=2, text_dim=32, mlp_width_ratio=1.0,
        num_layers=2,
    )  # fmt: skip
    return model, {
        "hidden_states": video(),
        "timestep": STEPS,
        "encoder_hidden_states": text(),
    }


def joy_image_plus():
    model = diffusers.JoyImageEditPlusTransformer3DModel(
        in_channels=4, hidden_size=256, num_attention_heads=2, text_dim=32, mlp_width_ratio=1.0,
        num_layers=2,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 20, 4, 1, 2, 2),
        "timestep": STEPS,
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": MASK,
        "shape_list": [[(1, 4, 4), (1, 2, 2)], [(1, 4, 3)]],
    }


def sana_wm():
    """Without cameras, whose rays have to be float32 on a CPU."""
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=224, num_attention_heads=2, softmax_every_n=2,
        caption_channels=32, mlp_ratio=1.0, chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=2,
    )  # fmt: skip
    return model, {
        "hidden_states": video(side=4),
        "timestep": STEPS.view(2, 1, 1).expand(-1, -1, 2),
        "encoder_hidden_states": randn(2, 1, 7, 32),
        "encoder_attention_mask": MASK,
        "chunk_plucker": video(6, side=4),
    }


BUILDERS = (
    cogvideox, consisid, easyanimate, ltx, ltx_tokens, ltx2, ltx23, sana_wm_refiner, cosmos,
    cosmos_frames, cosmos3, kandinsky5, kandinsky6, kandinsky6_sr, joy_image, joy_image_plus,
    sana_wm,
)  # fmt: skip
