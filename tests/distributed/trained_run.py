"""A run of a tiny network: trained_run.py RUN STEPS SAVE_EVERY [OPTION...].

Options: fsdp; ulysses; die=N, where process 1 is killed in step N; die_saving=N, killed while the
state of step N is written.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji"))
import test_train

from lumina.distributed.world import world
from lumina.emoji.trainer import Trainer
from lumina.models.next_dit.config import PRESETS

CONFIG = replace(test_train.CONFIG, batch=9, naming_batch=8, steps=12)


def data():
    torch.manual_seed(0)
    return test_train.pictures()


def kill(run):
    (Path(run) / "died").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def main(run, steps, save_every, *options):
    torch.set_num_threads(1)
    PRESETS["compact"] = replace(test_train.TINY, n_heads=4, n_kv_heads=2, dim=32)
    values = dict(option.split("=") for option in options if "=" in option)
    die, die_saving = (int(values.get(name, -1)) for name in ("die", "die_saving"))
    step = Trainer.step
    dying = int(os.environ.get("RANK", 0)) == 1

    def maybe_last(self):
        if dying and self.done == die:
            kill(run)
        if dying and self.done == die_saving - 1:
            import torch.distributed.checkpoint as dcp

            dcp.FileSystemWriter.write_data = lambda *_: kill(run)
        return step(self)

    Trainer.step = maybe_last
    with world("cpu", ulysses=2 if "ulysses" in options else 1) as processes:
        test_train.training.train(
            replace(CONFIG, steps=int(steps)), run, data=data(), world=processes,
            fsdp="fsdp" in options, checkpoint_activations="fsdp" in options, accumulate=2,
            save_every=int(save_every), progress=False,
        )  # fmt: skip


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except RuntimeError as error:
        sys.exit(f"error: {error}")
