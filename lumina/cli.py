"""Command line: `python -m lumina sample | demo | train | info | evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

import lumina
from lumina import ContextDrop, Guidance, RopeScaling
from lumina.checkpoints.files import read_safetensors
from lumina.emoji.data import load_emoji
from lumina.emoji.demo import draw_demo
from lumina.emoji.evaluate import evaluate
from lumina.emoji.pictures import read_picture, write_png
from lumina.emoji.train import TrainConfig, train
from lumina.models.next_dit.flops import forward_flops
from lumina.sampling.schedules import parse_schedule
from lumina.sampling.solvers import SOLVERS


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command. 0: done; 2: the arguments are at fault, 1: the work failed, in one line."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        message = " ".join(str(error).split())
        print(f"{parser.prog} {args.command}: error: {message}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    except KeyboardInterrupt:
        return 130
    return 0


def _build_parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = _Parser(prog="python -m lumina", description="A compact Next-DiT and its sampler.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        sub.set_defaults(run=run)
        return sub

    sub = command("sample", run_sample, "draw a picture for each prompt")
    sub.add_argument("prompts", nargs="+", metavar="PROMPT", help="in any of the 14 languages")
    sub.add_argument(
        "--out", type=Path, default="out.png", help="PNG file; several pictures in a row"
    )
    sub.add_argument("--image", type=Path, help="start from this picture (image-to-image)")
    sub.add_argument(
        "--strength", type=float, help="share of the time axis run from --image, in (0, 1]"
    )
    _add_model(sub)
    _add_sampling(sub)

    sub = command(
        "demo", run_demo, "draw the pictures of the README, checked against the reference"
    )
    sub.add_argument("--out", type=Path, default="samples/grid.png", help="PNG file")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")

    sub = command("train", run_train, "train a model, or continue an interrupted run")
    sub.add_argument(
        "run_folder", type=Path, metavar="RUN", help="folder of state, weights, loss curve"
    )
    sub.add_argument(
        "--data", type=Path, help="folder of emoji.png and emoji.json, instead of the shipped"
    )
    sub.add_argument("--device", default="cpu", help="cpu or cuda")
    sub.add_argument("--save-every", type=int, default=200, help="steps between two saves")
    for field in dataclasses.fields(TrainConfig):
        option = f"--{field.name.replace('_', '-')}"
        kind = {"int": int, "float": float, "str": str}.get(field.type)
        text = TRAIN_HELP[field.name]
        if field.type == "bool":
            action = argparse.BooleanOptionalAction
            sub.add_argument(option, action=action, default=field.default, help=text)
        else:
            sub.add_argument(option, type=kind, default=field.default, help=text)

    sub = command("info", run_info, "config, parameters and FLOPs of a checkpoint")
    sub.add_argument(
        "checkpoint", type=Path, nargs="?", default=lumina.COMPACT, help="what to look at"
    )
    sub.add_argument("--size", type=_size, default=None, help="WxH in latent pixels, for the FLOPs")
    sub.add_argument("--text", type=int, default=32, help="text tokens, for the FLOPs")
    _add_context_drop(sub)

    sub = command(
        "evaluate", run_evaluate, "how many pictures' nearest neighbour is the prompted emoji"
    )
    sub.add_argument("--count", type=int, help="English captions to draw; default: all")
    sub.add_argument(
        "--others", type=int, default=64, help="captions of every other language, 0: none"
    )
    sub.add_argument(
        "--large", type=int, default=128, help="captions drawn at twice the side, 0: none"
    )
    _add_model(sub)
    _add_sampling(sub)
    return parser


TRAIN_HELP = {
    "preset": "sizes of the model",
    "steps": "optimiser steps in all",
    "batch": "pictures in a step",
    "lr": "peak learning rate",
    "warmup": "steps in which the rate rises from 0",
    "decay": "of the rate: cosine (to 0) or constant",
    "t_sampling": "times: uniform or lognorm",
    "t_mean": "of the lognorm times, before the logistic function",
    "caption_dropout": "share of empty captions",
    "naming": "weight of the caption encoder's own loss",
    "naming_batch": "captions in that loss",
    "text_gate": "initial gate of the text branch, before tanh",
    "english": "share of English captions",
    "ema": "decay of the average of the weights",
    "clip": "bound of the gradient's L2 norm",
    "weight_decay": "of AdamW",
    "seed": "of everything random",
    "autocast": "bfloat16 matrix products",
}


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint",
        type=Path,
        default=lumina.COMPACT,
        help="a file that `train` or lumina.save wrote",
    )
    sub.add_argument("--backend", default="auto", help="of the ops: auto, torch, triton, cuda, cpu")
    sub.add_argument("--device", default="cpu", help="cpu or cuda")


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    best = lumina.COMPACT_SETTINGS
    sub.add_argument(
        "--steps",
        type=int,
        default=best["steps"],
        help="intervals of the time grid",
    )
    sub.add_argument("--solver", default=best["solver"], choices=SOLVERS, help="of the ODE")
    sub.add_argument(
        "--schedule",
        default=best["schedule"],
        help="uniform, rational:SHIFT, sigmoid[:MU,ALPHA,BETA]",
    )
    sub.add_argument(
        "--guidance",
        type=float,
        default=best["guidance"],
        help="weight; 1 is off",
    )
    sub.add_argument(
        "--guidance-until", type=float, default=1.0, help="guide while t < this, in [0, 1]"
    )
    sub.add_argument(
        "--guidance-renorm", type=float, help="bound of the guided norm over the plain one"
    )
    sub.add_argument(
        "--size", type=_size, default=(32, 32), help="WxH in pixels, multiples of the patch"
    )
    sub.add_argument(
        "--rope",
        default="time_aware",
        choices=["none", "linear", "ntk", "frequency_aware", "time_aware", "watershed"],
        help="how RoPE stretches beyond the trained size",
    )
    _add_context_drop(sub)
    sub.add_argument("--seed", type=int, default=0, help="of the noise; picture i takes seed + i")


def _add_context_drop(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--context-drop",
        type=int,
        default=1,
        metavar="FACTOR",
        help="side of the squares of tokens over which attention averages its keys, in all layers "
        "at t = 0 and in fewer and fewer towards t = 1; 1 is off",
    )


def _size(text: str) -> tuple[int, int]:
    """ "64x32" (width x height) as (H, W)."""
    try:
        width, height = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text!r}") from None
    return height, width


def _load(args):
    backend = None if args.backend == "auto" else args.backend
    encoder = lumina.load_caption_encoder(args.checkpoint, device=args.device)
    model = lumina.load(args.checkpoint, backend=backend, device=args.device)
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


def run_sample(args) -> None:
    settings, extra = _settings(args), {}
    model, encoder = _load(args)
    if args.image is not None:
        image = read_picture(args.image, args.size)
        extra["image"] = image.expand(len(args.prompts), -1, -1, -1)
    if args.strength is not None:
        extra["strength"] = args.strength
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(args.prompts))]
    start = time.perf_counter()
    result = lumina.sample(
        model, *encoder(args.prompts), *encoder([""]), size=args.size, **settings, **extra,
        generator=generators, progress=sys.stderr.isatty(),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    write_png(result.latents, args.out, columns=len(args.prompts), text="\n".join(args.prompts))
    print(f"{args.out}: {len(args.prompts)} pictures, {seconds:.1f} s, NFE {result.nfe}")


def run_demo(args) -> None:
    draw_demo(args.out, args.seed)


def run_train(args) -> None:
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)}
    data = load_emoji(args.data)
    trainer = train(
        TrainConfig(**fields),
        args.run_folder,
        data=data,
        device=args.device,
        save_every=args.save_every,
    )
    recent = trainer.losses[-100:]
    loss = sum(recent) / max(1, len(recent))
    print(f"{args.run_folder}: {trainer.done} of {args.steps} steps, loss {loss:.4f}", end="")
    print("" if trainer.done == args.steps else "; the same command continues")


def run_info(args) -> None:
    model = lumina.load(args.checkpoint, dtype=None)
    config, dtype = model.config, model.pad_token.dtype
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


def run_evaluate(args) -> None:
    settings = _settings(args)
    model, encoder = _load(args)
    data = load_emoji()
    settings.update(seed=args.seed, progress=sys.stderr.isatty())

    def report(name: str, count: int | None, **changed) -> None:
        # Spread over the whole set: neighbours in it look alike.
        count = min(count or len(data), len(data))
        indices = [i * len(data) // count for i in range(count)]
        right = evaluate(model, encoder, data, indices=indices, **{**settings, **changed})
        share = right.float().mean().item()
        print(f"{name}: {share:.1%} ({int(right.sum())} of {count})", flush=True)

    size = args.size
    print(
        f"{args.solver}, {args.steps} steps, schedule {args.schedule}, guidance {args.guidance}, "
        f"context drop {args.context_drop}, seed {args.seed}; nearest neighbour among {len(data)} "
        "emoji is the prompted one for"
    )
    report("en", args.count, size=size)
    if args.others:
        for language in data.captions:
            if language != "en":
                report(language, args.others, language=language, size=size)
    if args.large:
        twice = (2 * size[0], 2 * size[1])
        for rope in ("none", "linear", "time_aware"):
            scaling = _rope(rope, args.checkpoint)
            name = f"en at {twice[1]}x{twice[0]}, averaged down, RoPE scaling {rope}"
            report(name, args.large, size=twice, rope_scaling=scaling, batch=16)
