"""Flow-matching training of a Next-DiT and its caption encoder: `python -m lumina train`."""

from __future__ import annotations

import sys
from pathlib import Path

from lumina.distributed.world import World
from lumina.emoji.data import EmojiSet, load_emoji
from lumina.emoji.train_config import TrainConfig
from lumina.emoji.trainer import Trainer
from lumina.progress import progress as progress_of
from lumina.training import sharded
from lumina.training.run import Log, plot_losses, stop_signals
from lumina_kernels.output import check_output


def train(
    config: TrainConfig,
    run: str | Path,
    *,
    data: EmojiSet | None = None,
    device: str = "cpu",
    world: World | None = None,
    fsdp: bool = False,
    checkpoint_activations: bool = False,
    accumulate: int = 1,
    save_every: int = 200,
    progress: bool = True,
) -> Trainer:
    """Train, or continue a run that was interrupted, until `config.steps`.

    The settings alone determine the result: processes, fsdp, checkpoint_activations and accumulate
    change the time and the memory, and the order in which numbers are rounded.

    Args:
        config: settings; a run continues only with the same, but for more steps: the cosine of the
            rate then follows the new total.
        run: folder for `state.pt`, or `state/` from several processes (all that is needed to
            continue, with any number of processes), `model.safetensors` (averaged weights) and
            `loss.png`, replaced every `save_every` steps and where Ctrl-C or SIGTERM ends the run;
            and for `log.csv` and TensorBoard's files, if it is installed.
        data: pictures and captions; None takes the emoji that ship with the package.
        device: "cpu" or "cuda", of one process.
        world: of several processes, which all call this.
        fsdp: shard parameters, gradients, the optimiser's state and the averages over all
            processes.
        checkpoint_activations: keep the inputs of blocks alone, compute the rest again.
        accumulate: parts of a process's pictures, one after the other, in each step.
        save_every: steps between two saves; after a kill these are repeated, with the same result.
        progress: say what begins, and show a bar, or lines where there is no terminal.

    Returns:
        The trainer, at `config.steps` or where the run was stopped.

    Raises:
        ValueError: save_every is not positive, what `Trainer` refuses, or a state that
            `Trainer.load` refuses.
        RuntimeError: a loss is not finite.
        OSError: from the system; the files of the last save are still there.
    """
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    run, world = Path(run), world or World(device)
    run.mkdir(parents=True, exist_ok=True)
    for name in ("state.pt", "model.safetensors", "loss.png", "log.csv"):
        check_output(run / name)
    trainer = Trainer(
        config, data if data is not None else load_emoji(), world=world, fsdp=fsdp,
        checkpoint_activations=checkpoint_activations, accumulate=accumulate,
    )  # fmt: skip
    if (run / "state.pt").exists() or sharded.newest(run / "state"):
        trainer.load(run / "state.pt")
    shown = progress and world.first
    if shown:
        print(
            f"training from step {trainer.done} to {config.steps}, {config.batch} pictures each; "
            "Ctrl-C saves and stops",
            file=sys.stderr,
            flush=True,
        )
    with (
        stop_signals() as stop,
        Log(run if world.first else None, trainer.done) as log,
        progress_of(config.steps, "steps", done=trainer.done, shown=shown) as bar,
    ):
        while trainer.done < config.steps and not world.any(bool(stop)):
            loss = trainer.step()
            log.step(trainer.done, config.batch, loss, trainer.optimizer.param_groups[0]["lr"])
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if trainer.done % save_every == 0:
                _write(trainer, run)
    _write(trainer, run)
    return trainer


def _write(trainer: Trainer, run: Path) -> None:
    trainer.save(run / "state.pt")
    trainer.export(run / "model.safetensors")
    if trainer.world.first:
        plot_losses(trainer.losses, run / "loss.png")
