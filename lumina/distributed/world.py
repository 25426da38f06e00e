"""The processes that `torchrun` started, and what each of them does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.device_mesh import init_device_mesh

from lumina.distributed.guidance import GuidanceParallel
from lumina.distributed.sequence import SequenceParallel


@dataclass(frozen=True)
class World:
    """All processes of a program.

    Args:
        device: of this one.
        mesh: with dimensions "data", "guidance", "ring", "ulysses"; None: there is one process.
    """

    device: str
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.mesh is None or self.mesh.get_rank() == 0

    @property
    def size(self) -> int:
        """Processes in all."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def parts(self) -> int:
        """Parts in which pictures are shared, of which `place` is this process's number."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def place(self) -> int:
        return 0 if self.mesh is None else self.mesh["data"].get_local_rank()

    def part(self, count: int) -> slice:
        """Those of `count` pictures that are this process's, as evenly as it goes; the last parts
        may have none."""
        return part(count, self.place, self.parts)

    @property
    def training_mesh(self) -> DeviceMesh | None:
        """What `parallelize` takes; None: there is one process."""
        return None if self.mesh is None else self.mesh["data", "ring", "ulysses"]

    def mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """Over all processes, of each tensor; in one exchange."""
        if self.mesh is None:
            return tensors
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        each = (flat / self.size).split([x.numel() for x in tensors])
        return [y.view_as(x) for x, y in zip(tensors, each, strict=True)]

    def any(self, here: bool) -> bool:
        """Whether it holds on any process."""
        if self.mesh is None:
            return here
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def share(self, network: nn.Module) -> None:
        """Have the network's tokens and guidance shared by the processes that have the same
        pictures.

        Raises:
            ValueError: tokens are to be shared, and the network cannot.
        """
        if self.mesh is None:
            return
        SequenceParallel.from_mesh(self.mesh).share(network)
        if self.mesh["guidance"].size() > 1:
            network.guidance_parallel = GuidanceParallel.from_mesh(self.mesh)

    def joined(self, pictures: Tensor | None) -> Tensor | None:
        """Those of all parts, in order; None on every process but the first.

        pictures: of this part, (B, ...), on any device; None where the part has none.
        """
        if self.mesh is None:
            return pictures
        own = None if pictures is None else pictures.cpu()
        each: list = [None] * self.parts
        dist.all_gather_object(each, own, group=self.mesh.get_group("data"))
        there = [part for part in each if part is not None]
        return torch.cat(there) if self.first else None


def part(count: int, i: int, parts: int) -> slice:
    """Part i of `count` things in a row, as evenly as it goes, the last ones the smallest."""
    first, end = (-(-count * place // parts) for place in (i, i + 1))
    return slice(first, end)


@contextmanager
def world(device: str, *, ring: int = 1, ulysses: int = 1, guidance: bool = False) -> Iterator:
    """The `World` of this program, for the time of the block.

    Args:
        device: "cpu", or "cuda" for one GPU each, that with the process's number on its machine.
        ring, ulysses: processes that share the tokens of a picture, see `SequenceParallel`.
        guidance: share guidance, see `GuidanceParallel`.

    Raises:
        ValueError: the number of processes is no multiple of ring * ulysses (* 2 with guidance).
        RuntimeError: within the block, an exchange with another process failed.
    """
    shared = ring * ulysses * (2 if guidance else 1)
    started = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if started % shared:
        raise ValueError(
            f"ring {ring} * ulysses {ulysses}{' * guidance 2' if guidance else ''} = {shared} "
            f"must divide the number of processes, got {started}; `torchrun --nproc-per-node "
            f"{shared} -m lumina ...` starts as many"
        )
    if started == 1:
        yield World(device)
        return
    kind, backend = torch.device(device).type, "gloo"
    if kind == "cuda":
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    try:
        sizes = (started // shared, 2 if guidance else 1, ring, ulysses)
        names = ("data", "guidance", "ring", "ulysses")
        yield World(device, init_device_mesh(kind, sizes, mesh_dim_names=names))
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise RuntimeError(
                f"process {dist.get_rank()} of {started} cannot reach another one, which has ended "
                f"or hangs: {error}"
            ) from error
        raise
    finally:
        dist.destroy_process_group()
