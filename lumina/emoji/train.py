"""Flow-matching training of a Next-DiT and its caption encoder: `python -m lumina train`."""

from __future__ import annotations

import json
import math
import random
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.checkpoints.checkpoint import save
from lumina.checkpoints.files import read_pickle
from lumina.emoji.data import EmojiSet, load_emoji
from lumina.emoji.encoder import CaptionEncoder, to_bytes
from lumina.emoji.names import ARTICLES
from lumina.emoji.pictures import to_float
from lumina.models.next_dit.config import PRESETS, NextDiTConfig
from lumina.models.next_dit.model import NextDiT
from lumina.progress import progress as progress_of
from lumina.training.flow_matching import drawn_times, flow_matching_loss
from lumina.training.run import learning_rate, plot_losses, stop_signals
from lumina_kernels.output import check_output, replace


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; with the seed they determine it.

    Args:
        preset: of the model, see `lumina.PRESETS`.
        steps: optimiser steps in all.
        batch: images a step.
        lr: peak learning rate of AdamW.
        warmup: steps over which it rises from 0.
        decay: "cosine" to 0 at the last step, or "constant".
        t_sampling: "uniform" in [0, 1], or "lognorm", the logistic function of a normal variable.
        t_mean: mean of that variable; below 0 there are more times near the noise, where the
            caption alone decides.
        caption_dropout: share of captions replaced by the empty one, for classifier-free guidance.
        naming: weight of a second loss, on the caption encoder alone: the cross-entropy of telling
            which picture a caption is of, by a linear layer that is thrown away afterwards. It
            brings the languages together.
        naming_batch: captions a step in that loss.
        text_gate: initial gate of the text branch, before its tanh. Lumina-Next starts at 0; but a
            token learns its absolute position only through this branch, and from 0 the gates open
            slowly.
        english: share of English captions; the other languages share the rest evenly.
        ema: decay of the moving average of the weights, which is what a run delivers.
        clip: bound of the gradient's L2 norm.
        weight_decay: of AdamW.
        seed: of everything random, a signed or unsigned number of 64 bits.
        autocast: bfloat16 matrix products.

    Raises:
        ValueError: a value out of range; the message says which.
    """

    preset: str = "compact"
    steps: int = 6200
    batch: int = 128
    lr: float = 1.5e-3
    warmup: int = 200
    decay: str = "cosine"
    t_sampling: str = "lognorm"
    t_mean: float = -0.8
    caption_dropout: float = 0.1
    naming: float = 0.1
    naming_batch: int = 64
    text_gate: float = 1.0
    english: float = 0.3
    ema: float = 0.999
    clip: float = 2.0
    weight_decay: float = 0.0
    seed: int = 0
    autocast: bool = True

    def __post_init__(self):
        for name, allowed in (
            ("preset", tuple(PRESETS)),
            ("decay", ("cosine", "constant")),
            ("t_sampling", ("uniform", "lognorm")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for names, rule, holds in (
            ("steps batch naming_batch lr clip", "be positive", lambda z: z > 0),
            ("warmup naming weight_decay", "not be negative", lambda z: z >= 0),
            ("caption_dropout english ema", "lie in [0, 1]", lambda z: 0 <= z <= 1),
            ("lr naming weight_decay t_mean text_gate", "be finite", math.isfinite),
            ("batch naming_batch", f"be at most {2**20}", lambda z: z <= 2**20),
            ("seed", "fit in 64 bits", lambda z: -(2**63) <= z < 2**64),
        ):
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must {rule}, got {getattr(self, name)}")


class Trainer:
    """The whole state of a run: `save` writes it, `load` restores it, `step` advances it.

    A step's images, captions, times and noise come from (seed, number of the step) alone, so a run
    that was killed and resumed takes the same steps as one that was not.
    """

    def __init__(self, config: TrainConfig, data: EmojiSet, device: str = "cpu"):
        torch.manual_seed(config.seed)
        self.config, self.device = config, torch.device(device)
        self.images, self.captions = to_float(data.images).to(device), data.captions
        sizes = PRESETS[config.preset]
        self.model = _modules(sizes, len(data)).to(device)
        for layer in self.model["network"].layers:
            nn.init.constant_(layer.attention.gate, config.text_gate)
        self.params = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=config.lr,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.done = 0
        self.losses: list[float] = []

    def step(self) -> float:
        """Take one optimiser step; return its flow-matching loss.

        Raises:
            RuntimeError: the loss is not finite. The weights are as before.
        """
        config = self.config
        rng = random.Random(f"{config.seed} {self.done}")
        with torch.autocast(self.device.type, torch.bfloat16) if config.autocast else nullcontext():
            x1, symbols, t, noise = self.batch(rng)
            features = self.model["caption_encoder"](symbols)
            loss = flow_matching_loss(self.model["network"], x1, t, noise, *features)
            naming = naming_loss(self.model, *self.naming_batch(rng))
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss of step {self.done} is {value}; a lower lr may help")
        (loss + config.naming * naming).backward()
        nn.utils.clip_grad_norm_(self.params, config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.done, peak=config.lr, warmup=config.warmup, steps=config.steps,
                decay=config.decay,
            )  # fmt: skip
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Follows closely at first, or the initialisation would linger for 1 / (1 - ema) steps.
        decay = min(config.ema, (1 + self.done) / (10 + self.done))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
        self.done += 1
        self.losses.append(value)
        return value

    def batch(self, rng: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (B, C, H, W), caption symbols (B, N), times (B,) and noise of one step."""
        config = self.config
        index = [rng.randrange(len(self.images)) for _ in range(config.batch)]
        empty = [rng.random() < config.caption_dropout for _ in index]
        captions = [
            "" if nothing else draw_caption(self.captions, i, config.english, rng)
            for i, nothing in zip(index, empty, strict=True)
        ]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        t = drawn_times(config.batch, config.t_sampling, config.t_mean, generator)
        noise = torch.randn(config.batch, *self.images.shape[1:], generator=generator)
        return self.images[index], to_bytes(captions), t.to(self.device), noise.to(self.device)

    def naming_batch(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Caption symbols (B, N), of all languages alike, and the pictures they are of (B,)."""
        index = [rng.randrange(len(self.images)) for _ in range(self.config.naming_batch)]
        captions = [draw_caption(self.captions, i, 1 / len(self.captions), rng) for i in index]
        return to_bytes(captions), torch.tensor(index, device=self.device)

    def save(self, path: Path) -> None:
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
        }
        replace(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        """Continue the run saved at `path`, to `config.steps`, which may be more than it had.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no state of a run, or started with other settings.
        """
        state = read_pickle(path)
        parts = {"config": dict, "model": dict, "ema": list, "optimizer": dict, "losses": list}
        if not isinstance(state, dict) or any(
            not isinstance(state.get(name), kind) for name, kind in parts.items()
        ):
            raise ValueError(f"{path} is not the state of a run: it must hold {', '.join(parts)}")
        old, new = state["config"], asdict(self.config)
        changed = [
            f"{k} {old.get(k)} -> {v}"
            for k, v in new.items()
            if old.get(k) != v and not (k == "steps" and isinstance(old.get(k), int) and v > old[k])
        ]
        if changed:
            raise ValueError(f"{path} was started with other settings: {', '.join(changed)}")
        try:
            self.model.load_state_dict(state["model"])
            torch._foreach_copy_(self.ema, [average.to(self.device) for average in state["ema"]])
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses = [float(loss) for loss in state["losses"]]
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not the state of this run: {error}") from error
        self.done = len(self.losses)

    def export(self, path: Path) -> None:
        """Write the averaged weights, in float16, for `lumina.load` and `load_caption_encoder`."""
        sizes = PRESETS[self.config.preset]
        averaged = _modules(sizes, len(self.images))
        with torch.no_grad():
            for target, value in zip(averaged.parameters(), self.ema, strict=True):
                target.copy_(value)
        metadata = {
            "training": json.dumps({**asdict(self.config), "done": self.done}),
            "base_size": str(self.images.shape[-1] // sizes.patch_size),  # tokens, for RoPE
        }
        encoder = averaged["caption_encoder"].half()
        save(averaged["network"].half(), path, caption_encoder=encoder, metadata=metadata)


def _modules(sizes: NextDiTConfig, pictures: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "network": NextDiT(sizes),
            "caption_encoder": CaptionEncoder(sizes.cap_feat_dim),
            "naming": nn.Linear(sizes.cap_feat_dim, pictures),
        }
    )


def naming_loss(model: nn.ModuleDict, symbols: Tensor, index: Tensor) -> Tensor:
    """Cross-entropy of picking picture `index` by the mean of its caption's features."""
    features, mask = model["caption_encoder"](symbols)
    mean = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    logits = model["naming"](F.layer_norm(mean, mean.shape[-1:]))
    return F.cross_entropy(logits.float(), index)


def draw_caption(captions: dict[str, list[str]], i: int, english: float, rng: random.Random) -> str:
    """A caption of picture `i` in a random language, sometimes with an article before it."""
    language = "en"
    if rng.random() >= english:
        language = rng.choice([name for name in captions if name != "en"] or ["en"])
    caption = captions[language][i] or captions["en"][i]
    if language in ARTICLES and rng.random() < 0.25:
        caption = f"{rng.choice(ARTICLES[language])} {caption}"
    return caption


def train(
    config: TrainConfig,
    run: str | Path,
    *,
    data: EmojiSet | None = None,
    device: str = "cpu",
    save_every: int = 200,
    progress: bool = True,
) -> Trainer:
    """Train, or continue a run that was interrupted, until `config.steps`.

    Args:
        config: settings; a run continues only with the same, but for more steps: the cosine of the
            rate then follows the new total.
        run: folder for `state.pt` (all that is needed to continue), `model.safetensors` (averaged
            weights) and `loss.png`, replaced every `save_every` steps and where Ctrl-C or SIGTERM
            ends the run.
        data: pictures and captions; None takes the emoji that ship with the package.
        device: "cpu" or "cuda".
        save_every: steps between two saves; after a kill these are repeated, with the same result.
        progress: say what begins, and show a bar, or lines where there is no terminal.

    Returns:
        The trainer, at `config.steps` or where the run was stopped.

    Raises:
        ValueError: save_every is not positive, or a state that `Trainer.load` refuses.
        RuntimeError: a loss is not finite.
        OSError: from the system; the files of the last save are still there.
    """
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    for name in ("state.pt", "model.safetensors", "loss.png"):
        check_output(run / name)
    trainer = Trainer(config, data if data is not None else load_emoji(), device)
    if (run / "state.pt").exists():
        trainer.load(run / "state.pt")
    if progress:
        print(
            f"training from step {trainer.done} to {config.steps}, {config.batch} pictures each; "
            "Ctrl-C saves and stops",
            file=sys.stderr,
            flush=True,
        )
    with (
        stop_signals() as stop,
        progress_of(config.steps, "steps", done=trainer.done, shown=progress) as bar,
    ):
        while trainer.done < config.steps and not stop:
            loss = trainer.step()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if trainer.done % save_every == 0:
                _write(trainer, run)
    _write(trainer, run)
    return trainer


def _write(trainer: Trainer, run: Path) -> None:
    trainer.save(run / "state.pt")
    trainer.export(run / "model.safetensors")
    plot_losses(trainer.losses, run / "loss.png")
