"""Sound, proteins, and models of no library."""

import diffusers
import torch
from handwritten import DiT
from original import NextDiT
from torch import randn

from models.inputs import MASK, STEPS, TIMES, image, text


def stable_audio():
    model = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=16, num_layers=2, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=16, cross_attention_dim=64, time_proj_dim=32,
        global_states_input_dim=128, cross_attention_input_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 16),
        "timestep": STEPS.float(),
        "encoder_hidden_states": text(),
        "global_hidden_states": randn(2, 1, 128),
        "rotary_embedding": tuple(randn(2, 17, 16).repeat(1, 1, 2)),
        "encoder_attention_mask": MASK,
    }


def stable_audio3():
    model = diffusers.StableAudio3DiTModel(
        io_channels=16, embed_dim=128, depth=2, num_heads=2, cond_token_dim=32, global_cond_dim=32,
        local_add_cond_dim=5, timestep_features_dim=32, ff_mult=1.0, num_memory_tokens=3,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 16),
        "timestep": TIMES,
        "encoder_hidden_states": text(),
        "global_hidden_states": randn(2, 32),
        "encoder_attention_mask": MASK,
        "local_add_cond": randn(2, 5, 16),
    }


def ace_step():
    """Every other layer sees a window."""
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4,
        encoder_hidden_size=32,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 32, 4),
        "timestep": TIMES,
        "timestep_r": TIMES,
        "encoder_hidden_states": text(),
        "context_latents": randn(2, 32, 8),
    }


def longcat_audio():
    model = diffusers.LongCatAudioDiTTransformer(
        dit_dim=128, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=16, ff_mult=1.0
    )
    return model, {
        "hidden_states": randn(2, 16, 16),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
        "timestep": TIMES,
        "attention_mask": torch.arange(16) < torch.tensor([[16], [11]]),
        "latent_cond": randn(2, 16, 16),
    }


def minimax_h3():
    """Text, video and sound in one packed sequence, of two timesteps."""
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, hidden_size=192, num_layers=2, num_refiner_layers=1, ffn_dim=64,
        in_channels=4, audio_in_channels=4, text_dim=32, freq_dim=32, time_embed_hidden_dim=32,
        time_embed_dim=16,
    )  # fmt: skip
    places = torch.arange(28)
    return model, {
        "hidden_states": randn(2, 16, 16),
        "audio_hidden_states": randn(2, 5, 4),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([0.0, 0.7]),
        "timestep_indices": (places >= 11).long(),
        "token_tags": torch.tensor([1] * 7 + [0] * 16 + [2] * 5),
        "position_ids": places[:, None].expand(-1, 3).float(),
        "video_indices": places[7:23],
        "audio_indices": places[23:],
        "text_indices": places[:7],
    }


def minimax_music3():
    model = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=16, condition_dim=16, num_layers=2, num_attention_heads=2, ff_inner_dim=64,
        fourier_embedding_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 16),
        "timestep": TIMES,
        "encoder_hidden_states": randn(2, 16, 16),
    }


def minimax_music3_decoder():
    model = diffusers.MiniMaxMusic3RVQDepthDecoder(
        hidden_size=128, num_layers=2, num_attention_heads=2, intermediate_size=64,
        audio_vocab_size=8,
    )  # fmt: skip
    return model, {"inputs_embeds": randn(2, 8, 128)}


def t5_film():
    model = diffusers.T5FilmDecoder(
        input_dims=16, targets_length=16, d_model=32, num_layers=2, num_heads=2, d_ff=64
    )
    return model, {
        "encodings_and_masks": [[text(), MASK.float()]],
        "decoder_input_tokens": randn(2, 16, 16),
        "decoder_noise_time": TIMES,
    }


def rfd4_proteina():
    model = diffusers.RFD4ProteinaTransformer(
        nlayers=2, token_dim=64, nheads=2, dim_cond=32, pair_repr_dim=32, latent_dim=4,
        token_type_emb_dim=8, cath_emb_dim=8, t_emb_dim=16, seq_sep_dim=8, xt_pair_dist_dim=8,
        tri_mult_c=16, feats_seq=("xt_bb_ca", "xt_local_latents"), num_sequence_classes=8,
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",),
    )  # fmt: skip
    return model, {
        "bb_ca": randn(2, 7, 3),
        "local_latents": randn(2, 7, 4),
        "bb_ca_time": TIMES,
        "local_latents_time": TIMES,
        "padding_mask": MASK,
        "conditioning": {"is_in_context_conditioning": ~MASK, "supports_local_latent": MASK},
    }


def original_next_dit():
    model = NextDiT(channels=4, dim=288, layers=2, heads=4, kv_heads=2, text_dim=32)
    return model, {"x": image(), "t": TIMES, "text": text(), "text_mask": MASK}


def handwritten():
    model = DiT(channels=4, dim=192, layers=2, heads=3)
    return model, {"x": image(), "t": TIMES, "labels": torch.tensor([1, 5])}


BUILDERS = (
    stable_audio, stable_audio3, ace_step, longcat_audio, minimax_h3, minimax_music3,
    minimax_music3_decoder, t5_film, rfd4_proteina, original_next_dit, handwritten,
)  # fmt: skip
