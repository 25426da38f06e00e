"""The state of a run that several processes share, by PyTorch's distributed checkpoint (DCP).

Every save is a folder of its own, named by its step, in which each process writes its shards. Any
number of processes reads it, also one.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import distribute_tensor

from lumina_kernels.output import replace

NOTES = "run.json"  # beside DCP's files
WRAPPERS = "_checkpoint_wrapped_module."  # in the names of parameters that are wrapped


def newest(folder: Path) -> Path | None:
    """The last save in the folder; None: there is none."""
    saves = [path for path in folder.glob("[0-9]*") if path.name.isdigit()]
    return max(saves, key=lambda path: int(path.name), default=None)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: list[Tensor],
    notes: dict,
) -> None:
    """Write folder/step, whole or not at all, and then delete what was there before.

    All processes call it. Where the step is there already, nothing is written.

    Args:
        averages: of the model's parameters, in their order.
        notes: what JSON holds; the first process's.
    """
    target, first = folder / str(step), dist.get_rank() == 0
    hidden = folder / f".{step}.tmp"
    if target.exists():
        return
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp"):  # by a process that was killed
            shutil.rmtree(left)
        hidden.mkdir()
        replace(hidden / NOTES, lambda file: file.write_text(json.dumps(notes)))
    dist.barrier()
    dcp.save(_state(model, optimizer, averages), checkpoint_id=hidden)
    if first:
        os.rename(hidden, target)
        for old in folder.iterdir():
            if old != target:
                shutil.rmtree(old)
    dist.barrier()


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[Tensor]
) -> None:
    """Read a save into what all processes have, sharded as it is here.

    Raises:
        ValueError: it is damaged, or of another model.
    """
    state = _state(model, optimizer, averages)
    try:
        with warnings.catch_warnings():  # one process may read what several wrote
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, checkpoint_id=path)
    except (dcp.api.CheckpointException, RuntimeError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not the state of this run: {error}") from error
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def scatter(
    state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[Tensor]
) -> None:
    """Take over the state of one process, which all have read, in shards.

    state: "model" and "optimizer" as their `state_dict` made them, and "ema", the averages.
    """
    names = _names(model)
    old = state["optimizer"]
    moments = {
        "state": {names[i]: of_one for i, of_one in old["state"].items()},
        "param_groups": [
            {**group, "params": [names[i] for i in group["params"]]}
            for group in old["param_groups"]
        ],
    }
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=moments,
        options=StateDictOptions(full_state_dict=True),
    )  # fmt: skip
    for average, value in zip(averages, state["ema"], strict=True):
        value = value.to(average.device)
        average.copy_(distribute_tensor(value, average.device_mesh, average.placements))


def notes_of(path: Path) -> dict:
    """Raises ValueError: they are not there, or damaged."""
    try:
        return json.loads((path / NOTES).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not the state of a run: {error}") from error


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[Tensor]) -> dict:
    parameters, moments = get_state_dict(model, optimizer)
    average = dict(zip(_names(model), averages, strict=True))
    return {"model": parameters, "optimizer": moments, "average": average}


def _names(model: nn.Module) -> list[str]:
    return [name.replace(WRAPPERS, "") for name, _ in model.named_parameters()]
