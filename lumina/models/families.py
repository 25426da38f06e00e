"""The families of networks, by the name of their folder."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

import lumina.models.lumina2.config as lumina2
import lumina.models.next_dit.config as next_dit
import lumina.models.z_image.config as z_image
from lumina.models.lumina2 import reference as lumina2_reference
from lumina.models.lumina2.model import Lumina2
from lumina.models.next_dit import reference as next_dit_reference
from lumina.models.next_dit.model import NextDiT
from lumina.models.z_image import reference as z_image_reference
from lumina.models.z_image.model import ZImage

Config = next_dit.NextDiTConfig | lumina2.Lumina2Config | z_image.ZImageConfig
PRESETS = {**next_dit.PRESETS, **lumina2.PRESETS, **z_image.PRESETS}


class Family(NamedTuple):
    """What a network of this family is built of."""

    config: type
    network: type[nn.Module]
    reference: type[nn.Module]


FAMILIES = {
    "next_dit": Family(next_dit.NextDiTConfig, NextDiT, next_dit_reference.NextDiT),
    "lumina2": Family(lumina2.Lumina2Config, Lumina2, lumina2_reference.Lumina2),
    "z_image": Family(z_image.ZImageConfig, ZImage, z_image_reference.ZImage),
}
NETWORKS = tuple(family.network for family in FAMILIES.values())


def name_of(config: Config) -> str:
    """The family of a config."""
    return next(name for name, family in FAMILIES.items() if family.config is type(config))
