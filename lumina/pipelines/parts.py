"""The parts of a pipeline: which fit each other, and which family a network belongs to."""

from __future__ import annotations

from importlib import import_module

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

import lumina
from lumina.pipelines.call import check_scale, is_count
from lumina.pipelines.schedule import check_scheduler

PIPELINES = ("LuminaPipeline", "Lumina2Pipeline", "ZImagePipeline")


def pipeline_of(transformer: nn.Module) -> type:
    """The class of the pipeline for a network, or for what contains it."""
    pipelines = import_module("lumina.pipelines")
    for name in PIPELINES:
        pipeline = getattr(pipelines, name)
        if _network_in(transformer, pipeline) is not None:
            return pipeline
    raise TypeError(f"there is no pipeline for a {_name(transformer)}")


def network_of(pipeline: type, transformer: nn.Module) -> nn.Module:
    """The network itself, within torch.compile, adapters or no wrapper."""
    network = _network_in(transformer, pipeline)
    if network is None:
        raise TypeError(
            f"transformer of a {pipeline.__name__} must be a lumina.{pipeline.network}, or contain "
            f"one, got {_name(transformer)}"
        )
    return network


def halvings(vae) -> int:
    """How often a VAE halves a picture's sides."""
    config = vae.config
    return len(config.get("block_out_channels") or config.encoder_block_out_channels) - 1


def check_sample_size(name: str, size, patch: int) -> None:
    if not is_count(size) or size % patch:
        raise ValueError(f"{name} must be a whole multiple of {patch} above 0, got {size!r}")


def check_parts(pipeline: type, transformer, scheduler, vae, text_encoder, tokenizer) -> None:
    """Raise for the first part that is of another kind than it must be, or fits not the others."""
    config = network_of(pipeline, transformer).config
    check_scheduler(scheduler)
    if vae is not None:
        if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
            raise TypeError(f"vae must be an AutoencoderKL or AutoencoderTiny, got {_name(vae)}")
        if vae.config.latent_channels != config.in_channels:
            raise ValueError(
                f"vae must have the transformer's {config.in_channels} latent channels, "
                f"got {vae.config.latent_channels}"
            )
        if check_scale("scaling_factor of the vae", vae.config.scaling_factor) == 0:
            raise ValueError("scaling_factor of the vae must not be 0")
        check_scale("shift_factor of the vae", vae.config.get("shift_factor") or 0)
    if text_encoder is None:
        return
    if not isinstance(text_encoder, nn.Module):
        raise TypeError(f"text_encoder must be a module, got {_name(text_encoder)}")
    width = getattr(_text_config(text_encoder), "hidden_size", config.cap_feat_dim)
    if width != config.cap_feat_dim:
        raise ValueError(
            f"text_encoder must give features of width {config.cap_feat_dim}, which the "
            f"transformer takes, got {width} from a {_name(text_encoder)}"
        )
    if tokenizer is None:
        raise ValueError("a text_encoder needs its tokenizer, got None")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be one of transformers, got {_name(tokenizer)}")
    words = getattr(_text_config(text_encoder), "vocab_size", len(tokenizer))
    if len(tokenizer) > words:
        raise ValueError(
            f"tokenizer must be the text encoder's: it has {len(tokenizer)} tokens, "
            f"the {_name(text_encoder)} embeddings of {words}"
        )
    if tokenizer.pad_token is None:
        raise ValueError("tokenizer must have a pad_token, this one has none")
    if pipeline.needs_chat_template and not tokenizer.chat_template:
        raise ValueError(f"tokenizer of a {pipeline.__name__} must have a chat_template")


def _network_in(transformer, pipeline: type) -> nn.Module | None:
    if not isinstance(transformer, nn.Module):
        return None
    kind = getattr(lumina, pipeline.network)
    return next((module for module in transformer.modules() if isinstance(module, kind)), None)


def _text_config(text_encoder: nn.Module):
    config = getattr(text_encoder, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _name(thing) -> str:
    return type(thing).__name__
