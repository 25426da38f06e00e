"""A tiny random checkpoint for the command line, and a call of it."""

import torch

import lumina
from lumina.cli import main
from lumina.emoji.encoder import CaptionEncoder
from lumina.models.next_dit.config import NextDiTConfig

CONFIG = NextDiTConfig(
    patch_size=4, in_channels=3, dim=48, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=16,
    learn_sigma=False, cap_feat_dim=32,
)  # fmt: skip


def save_tiny(path):
    torch.manual_seed(1)
    model, encoder = lumina.NextDiT(CONFIG), CaptionEncoder(32, 16, 2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    lumina.save(model, path, caption_encoder=encoder, metadata={"base_size": "8"})
    return path


def run(*arguments):
    """The exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
