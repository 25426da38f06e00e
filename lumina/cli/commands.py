"""The commands, on parsed arguments."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

import lumina
from lumina import ContextDrop, Guidance, RopeScaling
from lumina.checkpoints.files import read_safetensors
from lumina.cli.pictures import ONLY_HERE, draw, has_own_encoder
from lumina.emoji.data import load_emoji
from lumina.emoji.demo import draw_demo
from lumina.emoji.evaluate import evaluate as draws_right
from lumina.emoji.names import Names, plain
from lumina.emoji.pictures import check_picture, read_picture, save_picture
from lumina.emoji.train_config import TrainConfig
from lumina.models.flops import forward_flops
from lumina.progress import progress
from lumina.sampling.schedules import parse_schedule

# What `sample` takes with the shipped model where the arguments do not say; pipelines have theirs.
COMPACT_DEFAULTS = {
    **{name: lumina.COMPACT_SETTINGS[name] for name in ("steps", "solver", "schedule", "guidance")},
    "size": (32, 32),
    "rope": "time_aware",
}
LONG = 10**6  # pixels times steps; the shipped model takes some ten seconds for them on two cores


def _load(args, device: str):
    backend = None if args.backend == "auto" else args.backend
    encoder = lumina.load_caption_encoder(args.checkpoint, device=device)
    model = lumina.load(args.checkpoint, backend=backend, device=device)
    if model.config.in_channels != 3 or model.config.axes != ("h", "w"):
        raise ValueError(
            f"the command line draws RGB pixels; {args.checkpoint} makes "
            f"{model.config.in_channels} channels over the axes {model.config.axes}: use "
            "lumina.sample and its decoder"
        )
    return model, encoder


def _settings(args) -> dict:
    parse_schedule(args.schedule)
    return {
        "steps": args.steps,
        "solver": args.solver,
        "schedule": args.schedule,
        "guidance": Guidance(args.guidance, until=args.guidance_until, renorm=args.guidance_renorm),
        "rope_scaling": _rope(args.rope, args.checkpoint),
        "context_drop": ContextDrop(args.context_drop),
    }


def _rope(kind: str, checkpoint: Path) -> RopeScaling | None:
    if kind == "none":
        return None
    return RopeScaling(kind, base_size=_base_size(checkpoint))


def _base_size(checkpoint: Path) -> int:
    """Tokens per side that the model was trained at; the released models' 1024 pixels are 64."""
    metadata = read_safetensors(checkpoint)[1] if checkpoint.is_file() else {}
    return int(metadata.get("base_size", 64))


def sample(args) -> None:
    with _world(args, args.guidance_parallel) as world:
        if has_own_encoder(args.checkpoint):
            _sample(args, world)
        else:
            draw(args, world)


def _world(args, guidance: bool = False):
    from lumina.distributed.world import world  # see `train`

    return world(args.device, ring=args.ring, ulysses=args.ulysses, guidance=guidance)


def _sample(args, world) -> None:
    for name in ONLY_HERE:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is for pipelines, {args.checkpoint} has none")
    for name, value in COMPACT_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    settings, extra, count = _settings(args), {}, len(args.prompts)
    own = world.part(count)
    height, width = args.size
    check_picture(args.out, count * width, height)
    if args.image is not None:
        image = read_picture(args.image, args.size)
        extra["image"] = image.expand(len(args.prompts[own]), -1, -1, -1)
    if args.strength is not None or args.image is not None:
        extra["strength"] = 0.8 if args.strength is None else args.strength
    captions = _captions(args, world.first)
    model, encoder = _load(args, world.device)
    world.share(model)
    seeds = [(args.seed + i) % 2**64 for i in range(count)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if world.first and count * width * height * args.steps >= LONG:
        _announce(f"drawing {_pictures(count)} of {width}x{height} in {args.steps} steps")
    total = None if args.solver == "dopri5" or args.image is not None else args.steps
    start = time.perf_counter()
    with progress(total, "steps", shown=world.first) as bar:
        result = lumina.sample(
            model, *encoder(captions[own]), *encoder([""]), size=args.size, **settings, **extra,
            generator=generators[own], callback=lambda *_: bar.update(),
        )  # fmt: skip
    pictures = world.joined(result.latents)
    if pictures is None:
        return
    seconds = time.perf_counter() - start
    save_picture(pictures, args.out, text="\n".join(args.prompts))
    print(f"{args.out}: {_pictures(count)}, {seconds:.1f} s, NFE {result.nfe}")


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _captions(args, said: bool) -> list[str]:
    """The prompts as the shipped model was trained to read them, without case and punctuation;
    where `said`, a line on stderr for each that it cannot know. For another checkpoint, the
    prompts."""
    if args.checkpoint.resolve() != lumina.COMPACT.resolve():
        return args.prompts
    names = Names(load_emoji())
    captions = [names.caption(prompt) for prompt in args.prompts]
    for prompt, caption in zip(args.prompts, captions, strict=True):
        if said and caption is None and plain(prompt):
            _announce(f"the model does not know {prompt!r}{_nearest(names, prompt)}")
    return [plain(p) if c is None else c for p, c in zip(args.prompts, captions, strict=True)]


def _nearest(names: Names, prompt: str) -> str:
    near = " or ".join(map(repr, names.nearest(prompt)))
    return f"; did you mean {near}?" if near else "; `python -m lumina prompts` lists what it knows"


def _announce(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prompts(args) -> None:
    names = Names(load_emoji())
    found = names.containing(args.word)
    if not found:
        raise ValueError(f"no name has {args.word!r} in it{_nearest(names, args.word)}")
    for character, language, caption in found:
        print(f"{character}\t{language}\t{caption}")


def demo(args) -> None:
    draw_demo(args.out, args.seed)


def train(args) -> None:
    # Here, because PyTorch's engine for several processes takes more than a second to import.
    from lumina.emoji.train import train as run_training

    config = TrainConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)})
    data = load_emoji(args.data)
    with _world(args) as world:
        trainer = run_training(
            config, args.run_folder, data=data, world=world, save_every=args.save_every,
            fsdp=args.fsdp, checkpoint_activations=args.checkpoint_activations,
            accumulate=args.accumulate,
        )  # fmt: skip
        if world.first:
            recent = trainer.losses[-100:]
            loss = sum(recent) / max(1, len(recent))
            print(
                f"{args.run_folder}: {trainer.done} of {args.steps} steps, loss {loss:.4f}", end=""
            )
            print("" if trainer.done == args.steps else "; the same command continues")
    if trainer.done < args.steps:  # saved, but the shell has to know
        raise KeyboardInterrupt


def info(args) -> None:
    model = lumina.load(args.checkpoint, dtype=None)
    config, dtype = model.config, model.dtype
    print(json.dumps(dataclasses.asdict(config), indent=2))
    count = sum(p.numel() for p in model.parameters())
    print(f"head_dim {config.head_dim}, FFN width {config.ffn_dim}, stored as {dtype}")
    print(f"parameters {count:,}")
    side = _base_size(args.checkpoint) * config.patch_size
    height, width = args.size or (side, side)
    size = (width,) if config.axes == ("w",) else (height, width)
    whole = forward_flops(config, size, args.text)
    print(
        f"forward of one {'x'.join(map(str, size[::-1]))} latent with {args.text} text tokens: "
        f"{whole / 1e9:.3f} GFLOP"
    )
    drop = ContextDrop(args.context_drop)
    if args.context_drop > 1:
        least = forward_flops(config, size, args.text, drop.at(0.0, config.n_layers))
        times = [(i + 0.5) / 600 for i in range(600)]
        pooled = sum(sum(drop.layers(t, config.n_layers)) for t in times) / len(times)
        mean = whole - (whole - least) * pooled / config.n_layers
        print(
            f"with context drop {args.context_drop}: {least / 1e9:.3f} GFLOP at t = 0 "
            f"({1 - least / whole:.1%} saved), {mean / 1e9:.3f} on average over t in [0, 1] "
            f"({1 - mean / whole:.1%} saved)"
        )


def evaluate(args) -> None:
    settings = _settings(args)
    model, encoder = _load(args, args.device)
    data = load_emoji()
    english = len(data) if args.count is None else min(args.count, len(data))
    others = [language for language in data.captions if language != "en"] if args.others else []
    settings.update(seed=args.seed, progress=True)

    def report(name: str, count: int, **changed) -> None:
        # Spread over the whole set: neighbours in it look alike.
        count = min(count, len(data))
        indices = [i * len(data) // count for i in range(count)]
        right = draws_right(model, encoder, data, indices=indices, **{**settings, **changed})
        share = right.float().mean().item()
        print(f"{name}: {share:.1%} ({int(right.sum())} of {count})", flush=True)

    size = args.size
    print(
        f"{args.solver}, {args.steps} steps, schedule {args.schedule}, guidance {args.guidance}, "
        f"context drop {args.context_drop}, seed {args.seed}; nearest neighbour among {len(data)} "
        "emoji is the prompted one for",
        flush=True,
    )
    report("en", english, size=size)
    for language in others:
        report(language, args.others, language=language, size=size)
    if args.large:
        twice = (2 * size[0], 2 * size[1])
        for rope in ("none", "linear", "time_aware"):
            scaling = _rope(rope, args.checkpoint)
            name = f"en at {twice[1]}x{twice[0]}, averaged down, RoPE scaling {rope}"
            report(name, args.large, size=twice, rope_scaling=scaling, batch=16)
