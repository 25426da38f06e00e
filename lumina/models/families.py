"""The families of networks, by the name of their folder."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lumina.models.lumina2 import reference as lumina2_reference
from lumina.models.lumina2.config import Lumina2Config
from lumina.models.lumina2.model import Lumina2
from lumina.models.next_dit import reference as next_dit_reference
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.next_dit.model import NextDiT
from lumina.models.z_image import reference as z_image_reference
from lumina.models.z_image.config import ZImageConfig
from lumina.models.z_image.model import ZImage

Config = NextDiTConfig | Lumina2Config | ZImageConfig


class Family(NamedTuple):
    """What a network of this family is built of."""

    config: type
    network: type[nn.Module]
    reference: type[nn.Module]


FAMILIES = {
    "next_dit": Family(NextDiTConfig, NextDiT, next_dit_reference.NextDiT),
    "lumina2": Family(Lumina2Config, Lumina2, lumina2_reference.Lumina2),
    "z_image": Family(ZImageConfig, ZImage, z_image_reference.ZImage),
}
NETWORKS = tuple(family.network for family in FAMILIES.values())


def name_of(config: Config) -> str:
    """The family of a config."""
    return next(name for name, family in FAMILIES.items() if family.config is type(config))
