"""The state of a training run of a Next-DiT and its caption encoder, and its steps."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lumina.checkpoints.checkpoint import save
from lumina.checkpoints.files import read_pickle
from lumina.distributed.parallelize import parallelize, shard
from lumina.distributed.world import World, part
from lumina.emoji.data import EmojiSet
from lumina.emoji.encoder import CaptionEncoder, to_bytes
from lumina.emoji.names import ARTICLES
from lumina.emoji.pictures import to_float
from lumina.emoji.train_config import TrainConfig
from lumina.models.next_dit.config import PRESETS, NextDiTConfig
from lumina.models.next_dit.model import NextDiT
from lumina.training import sharded
from lumina.training.flow_matching import drawn_times, flow_matching_loss
from lumina.training.run import learning_rate
from lumina_kernels.output import replace


class Trainer:
    """The whole state of a run: `save` writes it, `load` restores it, `step` advances it.

    A step's images, captions, times and noise come from (seed, number of the step) alone, so a run
    that was killed and resumed takes the same steps as one that was not, on any number of
    processes: each takes its part of the step's pictures.

    Args:
        config, data: as for `train`.
        device: "cpu" or "cuda", of one process.
        world: of several; then its device counts.
        fsdp, checkpoint_activations, accumulate: as for `train`.

    Raises:
        ValueError: fewer pictures in a step than parts; fsdp in one process.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: EmojiSet,
        device: str = "cpu",
        *,
        world: World | None = None,
        fsdp: bool = False,
        checkpoint_activations: bool = False,
        accumulate: int = 1,
    ):
        self.world, self.fsdp, self.accumulate = world or World(device), fsdp, accumulate
        self._check(config)
        torch.manual_seed(config.seed)
        self.config, self.device = config, torch.device(self.world.device)
        device = self.device
        self.images, self.captions = to_float(data.images).to(device), data.captions
        sizes = PRESETS[config.preset]
        self.model = _modules(sizes, len(data)).to(device)
        for layer in self.model["network"].layers:
            nn.init.constant_(layer.attention.gate, config.text_gate)
        mesh = self.world.training_mesh
        if mesh is not None or checkpoint_activations:
            network = self.model["network"]
            parallelize(network, mesh, fsdp=fsdp, checkpoint_activations=checkpoint_activations)
            if fsdp:
                shard(self.model["caption_encoder"], mesh)
                shard(self.model["naming"], mesh)
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

    def _check(self, config: TrainConfig) -> None:
        parts = self.world.parts * self.accumulate
        least = min(config.batch, config.naming_batch)
        if parts > least:
            raise ValueError(
                f"batch and naming_batch must have a picture for each of the {parts} parts "
                f"(processes * accumulate) of a step, got {least}"
            )
        if self.fsdp and self.world.mesh is None:
            raise ValueError("fsdp needs several processes: torchrun --nproc-per-node N ...")

    def step(self) -> float:
        """Take one optimiser step; return its flow-matching loss.

        Raises:
            RuntimeError: the loss is not finite. The weights are as before.
        """
        config = self.config
        rng = random.Random(f"{config.seed} {self.done}")
        batch, naming_batch = self.batch(rng), self.naming_batch(rng)
        value, parts = torch.zeros((), device=self.device), self.world.parts
        for i in range(self.accumulate):
            loss, naming = self._losses(batch, naming_batch, self.world.place * self.accumulate + i)
            (parts * (loss + config.naming * naming)).backward()
            value += parts * loss.detach()
        value = self.world.mean([value])[0].item()
        if not math.isfinite(value):
            self.optimizer.zero_grad()
            raise RuntimeError(f"the loss of step {self.done} is {value}; a lower lr may help")
        if not self.fsdp:
            for p, mean in zip(
                self.params, self.world.mean([p.grad for p in self.params]), strict=True
            ):
                p.grad = mean
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

    def _losses(self, batch, naming_batch, i: int) -> tuple[Tensor, Tensor]:
        """Part i of a step's losses; the sum of all parts is the loss of the step."""
        parts = self.world.parts * self.accumulate
        rows, named = (part(len(whole[0]), i, parts) for whole in (batch, naming_batch))
        x1, symbols, t, noise = (z[rows] for z in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            features = self.model["caption_encoder"](symbols)
            loss = flow_matching_loss(self.model["network"], x1, t, noise, *features)
            naming = naming_loss(self.model, *(z[named] for z in naming_batch))
        return (
            loss * (len(x1) / self.config.batch),
            naming * (len(naming_batch[1][named]) / self.config.naming_batch),
        )

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
        """Write what is needed to continue: a file, or from several processes a folder beside it,
        without its suffix, to which each process writes its part."""
        notes = {"config": asdict(self.config), "losses": self.losses}
        folder = path.with_suffix("")
        if self.world.mesh is not None:
            sharded.save(folder, self.done, self.model, self.optimizer, self.ema, notes)
            if self.world.first:
                path.unlink(missing_ok=True)
            return
        state = {
            **notes,
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
        }
        replace(path, lambda file: torch.save(state, file))
        if folder.is_dir():
            shutil.rmtree(folder)

    def load(self, path: Path) -> None:
        """Continue the run saved at `path`, or in the folder beside it if that is further, to
        `config.steps`, which may be more than it had. The number of processes may be another one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no state of a run, or started with other settings.
        """
        shards = sharded.newest(path.with_suffix(""))
        if shards is None or path.exists():
            self._load_file(path)
        if shards is not None and int(shards.name) > self.done:
            notes = sharded.notes_of(shards)
            self._check_state(shards, notes, {"config": dict, "losses": list})
            sharded.load(shards, self.model, self.optimizer, self.ema)
            self.losses = [float(loss) for loss in notes["losses"]]
            self.done = len(self.losses)

    def _load_file(self, path: Path) -> None:
        state = read_pickle(path)
        parts = {"config": dict, "model": dict, "ema": list, "optimizer": dict, "losses": list}
        self._check_state(path, state, parts)
        try:
            if self.fsdp:
                sharded.scatter(state, self.model, self.optimizer, self.ema)
            else:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                torch._foreach_copy_(self.ema, [z.to(self.device) for z in state["ema"]])
            self.losses = [float(loss) for loss in state["losses"]]
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not the state of this run: {error}") from error
        self.done = len(self.losses)

    def _check_state(self, path: Path, state, parts: dict[str, type]) -> None:
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

    def export(self, path: Path) -> None:
        """Write the averaged weights, in float16, for `lumina.load` and `load_caption_encoder`."""
        sizes = PRESETS[self.config.preset]
        averaged = _modules(sizes, len(self.images))
        with torch.no_grad():
            for target, value in zip(averaged.parameters(), self.ema, strict=True):
                target.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
        if not self.world.first:
            return
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
