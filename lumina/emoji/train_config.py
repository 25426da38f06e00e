"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lumina.models.next_dit.config import PRESETS


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
