"""Small joint networks with random weights, ours and the reference, and their inputs."""

import torch
from common import DEVICE
from networks import randn, randomise

from lumina import Lumina2, Lumina2Config, ZImage, ZImageConfig
from lumina.models.families import FAMILIES, name_of

SIZES = dict(in_channels=4, n_layers=3, n_refiner_layers=2, cap_feat_dim=20)
CONFIGS = {
    # Two query heads on one key/value head; a head of 120, as Boogu-Image has; unequal axes.
    "lumina2": Lumina2Config(
        **SIZES, dim=96, n_heads=4, n_kv_heads=2, axes_dims=(8, 8, 8), multiple_of=16
    ),
    "lumina2-120": Lumina2Config(
        **SIZES, dim=240, n_heads=2, n_kv_heads=1, axes_dims=(40, 40, 40), ffn_dim_multiplier=0.3
    ),
    "z_image": ZImageConfig(**SIZES, dim=96, n_heads=3, n_kv_heads=3, axes_dims=(8, 12, 12)),
}
NETWORKS = {Lumina2Config: Lumina2, ZImageConfig: ZImage}

# Texts of 35 tokens, more than Z-Image's multiple: all of them, holes, the first three.
MASK = torch.zeros(3, 35, dtype=torch.bool)
MASK[0], MASK[1, 1::3], MASK[2, :3] = True, True, True
T = torch.tensor([0.25, 0.5, 0.875])


def pair(name, dtype=torch.float64, backend="torch"):
    """Ours and the reference with the same weights, in float64."""
    config = CONFIGS[name]
    theirs = randomise(FAMILIES[name_of(config)].reference(config), dtype)
    ours = NETWORKS[type(config)](config, backend=backend).to(DEVICE, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(*sizes, dtype=torch.float64):
    """x, t, cap_feats, cap_mask for three images of one size (H, W), or of three."""
    x = [randn(4, *size).to(dtype).double() for size in (sizes if len(sizes) > 1 else sizes * 3)]
    x = torch.stack(x) if len(sizes) == 1 else x
    feats = randn(3, 35, 20).to(dtype).double()
    return x, T.to(DEVICE, torch.float64), feats, MASK.to(DEVICE)
