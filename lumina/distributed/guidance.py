"""Guidance on two processes: one runs the network for the captions, one for what to avoid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup

from lumina.distributed.exchange import all_gather


@dataclass(frozen=True)
class GuidanceParallel:
    """The two processes that share the batch of 2B which guidance makes of B pictures.

    The first runs the network for the captions and the second for the negative ones, each on B
    pictures; then they exchange velocities, and both take the same step.

    Args:
        group: the two processes.

    Raises:
        ValueError: they are not two.
    """

    group: ProcessGroup

    def __post_init__(self):
        if self.group.size() != 2:
            raise ValueError(f"guidance needs a group of 2 processes, got {self.group.size()}")

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> GuidanceParallel:
        """Of the dimension "guidance" of a mesh.

        Raises:
            ValueError: the mesh has none, or it is not of size 2.
        """
        names = mesh.mesh_dim_names or ()
        if "guidance" not in names:
            raise ValueError(f'mesh must have a dimension "guidance", got {names}')
        return cls(mesh.get_group("guidance"))

    def __deepcopy__(self, memo) -> GuidanceParallel:
        return self  # process groups have no copies

    @property
    def negative(self) -> bool:
        """Whether this process has the negative captions."""
        return self.group.rank() == 1

    def both(self, own: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """The velocities (B, ...) of the captions and behind them those of the negative ones."""
        if isinstance(own, Tensor):
            return all_gather(own, 0, self.group)
        shapes = [v.shape for v in own] * 2
        flat = all_gather(torch.cat([v.flatten() for v in own]), 0, self.group)
        parts = flat.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
