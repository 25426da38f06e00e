"""Wan and its kin, which compute norms, modulations and residuals in float32."""

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import randn

from models.inputs import STEPS, text, video

WAN = {
    "num_attention_heads": 2, "in_channels": 4, "out_channels": 4, "text_dim": 32, "ffn_dim": 64,
    "num_layers": 1,
}  # fmt: skip
WITH_IMAGE = {"image_dim": 16, "added_kv_proj_dim": 256}


def _wan_inputs(**more):
    return {
        "hidden_states": video(), "timestep": STEPS, "encoder_hidden_states": text(), **more
    }  # fmt: skip


def wan():
    return diffusers.WanTransformer3DModel(**WAN | {"num_layers": 2}), _wan_inputs()


def wan_i2v():
    """With a second cross attention, to an image."""
    model = diffusers.WanTransformer3DModel(**WAN, **WITH_IMAGE)
    return model, _wan_inputs(encoder_hidden_states_image=randn(2, 3, 16))


def wan_ti2v():
    """Each token has a timestep of its own."""
    steps = torch.tensor([0, 700]).repeat_interleave(16).expand(2, -1)
    return diffusers.WanTransformer3DModel(**WAN), _wan_inputs(timestep=steps)


def wan_vace():
    model = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=4)
    return model, _wan_inputs(control_hidden_states=video())


def wan_animate():
    model = diffusers.WanAnimateTransformer3DModel(
        **WAN | {"in_channels": 12}, image_dim=16, added_kv_proj_dim=256, latent_channels=4,
        motion_encoder_channel_sizes={"4": 8, "8": 8}, motion_encoder_size=8, motion_style_dim=16,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )  # fmt: skip
    return model, _wan_inputs(
        hidden_states=video(12),
        encoder_hidden_states_image=randn(2, 3, 16),
        pose_hidden_states=video(4, 1),
        face_pixel_values=video(3, 4),
    )


def wan_animate2():
    """Its first pass over a reference, which fills a cache."""
    model = diffusers.WanAnimate2Transformer3DModel(
        text_len=7, in_dim=8, dim=256, ffn_dim=64, freq_dim=32, text_dim=32, out_dim=4,
        num_heads=2, num_layers=1, use_img_emb=False,
    )  # fmt: skip
    sizes = torch.tensor([[2, 4, 4]])
    return model, {
        "hidden_states": list(video()),
        "timestep": STEPS,
        "encoder_hidden_states": [randn(n, 32) for n in (7, 4)],
        "condition_latents": list(video()),
        "kv_cache": WanAnimate2KVCache(1),
        "kv_cache_mode": "extract",
        "seq_len": 32,
        "offset_grid_sizes": sizes,
        "reference_grid_sizes": sizes,
    }


def chronoedit():
    return diffusers.ChronoEditTransformer3DModel(**WAN), _wan_inputs()


def skyreels(**how):
    return diffusers.SkyReelsV2Transformer3DModel(**WAN, **how), _wan_inputs()


def skyreels_forcing():
    """Frames have timesteps of their own and see no later ones."""
    model, inputs = skyreels(num_frame_per_block=2, inject_sample_info=True)
    steps = torch.tensor([[0, 100, 600, 700]] * 2)
    more = {"hidden_states": video(frames=4, side=4), "timestep": steps, "fps": [1]}
    return model, inputs | more | {"enable_diffusion_forcing": True}


def anyflow():
    model = diffusers.AnyFlowTransformer3DModel(**WAN)
    steps = torch.tensor([[3, 3], [700, 700]])
    frames = video().transpose(1, 2)
    return model, _wan_inputs(hidden_states=frames, timestep=steps, r_timestep=steps // 2)


def anyflow_far():
    """Chunks of frames that see no later ones, by a mask of blocks."""
    model = diffusers.AnyFlowFARTransformer3DModel(**WAN, chunk_partition=(1, 1))
    steps = torch.tensor([[3, 3], [700, 700]])
    return model, _wan_inputs(
        hidden_states=video().transpose(1, 2), timestep=steps, r_timestep=steps // 2,
        chunk_partition=[1, 1],
    )  # fmt: skip


def helios():
    model = diffusers.HeliosTransformer3DModel(**WAN)
    return model, _wan_inputs(
        indices_hidden_states=torch.arange(3, 5).expand(2, -1),
        indices_latents_history_short=torch.arange(2, 3).expand(2, -1),
        indices_latents_history_mid=torch.arange(1, 3).expand(2, -1),
        indices_latents_history_long=torch.arange(0, 4).expand(2, -1),
        latents_history_short=video(frames=1),
        latents_history_mid=video(frames=2),
        latents_history_long=video(frames=4),
    )


BUILDERS = (
    wan, wan_i2v, wan_ti2v, wan_vace, wan_animate, wan_animate2, chronoedit, skyreels,
    skyreels_forcing, anyflow, anyflow_far, helios,
)  # fmt: skip
