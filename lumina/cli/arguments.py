"""The arguments of the commands."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

import lumina
import lumina_kernels
from lumina.cli import commands
from lumina.cli.pictures import DTYPES
from lumina.cli.types import device, seed, size, whole
from lumina.emoji.train_config import TrainConfig
from lumina.sampling.solvers import SOLVERS


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that there are."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a program of this name; `run` in what it returns is the command."""
    formatter = _Formatter
    parser = _Parser(prog=name, description="Pictures from text, by the Lumina family.")
    version = f"lumina-kernels {lumina_kernels.__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    choices = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = choices.add_parser(name, help=text, description=text, formatter_class=formatter)
        sub.set_defaults(run=run)
        return sub

    sub = command("sample", commands.sample, "draw a picture for each prompt")
    sub.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help="of the shipped model names in any of its 14 languages",
    )
    sub.add_argument(
        "--out",
        type=Path,
        default="out.png",
        help="picture file, in the format of its suffix; several pictures lie in a row",
    )
    sub.add_argument("--image", type=Path, help="start from this picture (image-to-image)")
    sub.add_argument(
        "--strength",
        type=float,
        help="share of the time axis run from --image, in (0, 1]; unless given, 0.8 with the "
        "shipped model, with a pipeline 0.6, or 1 with a mask",
    )
    _add_model(sub)
    _add_sampling(sub)
    _leave_to_pipelines(sub)
    _add_pipeline(sub)
    _add_processes(sub).add_argument(
        "--guidance-parallel",
        action="store_true",
        help="two processes share a picture's guidance, one runs the captions",
    )

    sub = command(
        "demo", commands.demo, "draw the pictures of the README, checked against the reference"
    )
    sub.add_argument("--out", type=Path, default="samples/grid.png", help="picture file")
    sub.add_argument("--seed", type=seed, default=0, help="of the noise")

    sub = command("prompts", commands.prompts, "list what the shipped model can draw")
    sub.add_argument(
        "word",
        nargs="?",
        default="",
        metavar="WORD",
        help="list the names with this in them, in all languages; without it, all English names",
    )

    sub = command(
        "train",
        commands.train,
        "train a model, or continue a run",
    )
    sub.add_argument(
        "run_folder", type=Path, metavar="RUN", help="folder of state, weights, loss curve"
    )
    sub.add_argument(
        "--data", type=Path, help="folder of emoji.png and emoji.json, instead of the shipped"
    )
    sub.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
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

    group = _add_processes(sub)
    group.add_argument(
        "--fsdp", action="store_true", help="shard parameters, optimiser and average over all"
    )
    group.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="keep the inputs of the blocks alone for the backward; also with one process",
    )
    group.add_argument(
        "--accumulate",
        type=whole(1, 2**20),
        default=1,
        metavar="N",
        help="take a step's pictures in N parts, one after the other; also with one process",
    )

    sub = command("info", commands.info, "config, parameters and FLOPs of a checkpoint")
    sub.add_argument(
        "checkpoint", type=Path, nargs="?", default=lumina.COMPACT, help="what to look at"
    )
    sub.add_argument(
        "--size",
        type=size,
        default=None,
        metavar="WxH",
        help="in latent pixels, for the FLOPs; default: the trained size",
    )
    sub.add_argument("--text", type=whole(0, 10**6), default=32, help="text tokens, for the FLOPs")
    _add_context_drop(sub)

    sub = command(
        "evaluate", commands.evaluate, "how many pictures' nearest neighbour is the prompted emoji"
    )
    sub.add_argument("--count", type=whole(1), help="English captions to draw; default: all")
    sub.add_argument(
        "--others", type=whole(0), default=64, help="captions of every other language, 0: none"
    )
    sub.add_argument(
        "--large", type=whole(0), default=128, help="captions drawn at twice the side, 0: none"
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
    sub.add_argument("--device", type=device, default="cpu", help="cpu or cuda")


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    best = lumina.COMPACT_SETTINGS
    sub.add_argument(
        "--steps",
        type=whole(1, 10**6),
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
        help="weight; 1 is off, of a Z-Image 0",
    )
    sub.add_argument(
        "--guidance-until", type=float, default=1.0, help="guide while t < this, in [0, 1]"
    )
    sub.add_argument(
        "--guidance-renorm", type=float, help="bound of the guided norm over the plain one"
    )
    sub.add_argument(
        "--size",
        type=size,
        default="32x32",
        metavar="WxH",
        help="in pixels, multiples of the patch",
    )
    sub.add_argument(
        "--rope",
        default="time_aware",
        choices=["none", "linear", "ntk", "frequency_aware", "time_aware", "watershed"],
        help="how RoPE stretches beyond the trained size",
    )
    _add_context_drop(sub)
    sub.add_argument("--seed", type=seed, default=0, help="of the noise; picture i takes seed + i")


def _leave_to_pipelines(sub: argparse.ArgumentParser) -> None:
    """Let a checkpoint's pipeline choose what is not given."""
    for action in sub._actions:
        if action.dest in commands.COMPACT_DEFAULTS:
            best = action.default if action.default != (32, 32) else "32x32"
            action.help += f"; unless given, {best} with the shipped model, else the pipeline's own"
            action.default = None
        elif action.dest == "checkpoint":
            action.help += ", or a folder (or file of weights) of Lumina-Next, Lumina-Image 2.0 or "
            action.help += "Z-Image, which is drawn with by its pipeline"


def _add_pipeline(sub: argparse.ArgumentParser) -> None:
    sub = sub.add_argument_group("with the pipeline of a released model")
    sub.add_argument("--negative", metavar="TEXT", help="what guidance leads away from")
    sub.add_argument(
        "--region",
        nargs=2,
        action="append",
        metavar=("BOX", "TEXT"),
        help="a caption for a part of the picture, LEFT,TOP,RIGHT,BOTTOM as shares of its sides; "
        "once for each part (Lumina-Next)",
    )
    sub.add_argument(
        "--mask", type=Path, help="redraw --image where this picture is white (inpainting)"
    )
    sub.add_argument("--text-encoder", type=Path, help="folder, for weights that come alone")
    sub.add_argument("--tokenizer", type=Path, help="folder; unless given, the text encoder's")
    sub.add_argument("--vae", type=Path, help="folder, for weights that come alone")
    sub.add_argument(
        "--dtype", choices=list(DTYPES), help="of network, text encoder and VAE; fp32 unless given"
    )
    sub.add_argument(
        "--stages",
        action="store_const",
        const=True,
        help="have one of text encoder, network and VAE in memory at a time",
    )
    sub.add_argument(
        "--tiled", action="store_const", const=True, help="decode by tiles, for large pictures"
    )
    sub.add_argument(
        "--max-sequence-length", type=whole(1, 10**6), help="tokens of a prompt that count"
    )
    sub.add_argument(
        "--verbose", action="store_const", const=True, help="tell times and the peak of memory"
    )


def _add_processes(sub: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = sub.add_argument_group(
        "with several processes",
        "torchrun --nproc-per-node N -m lumina ... ; pictures are spread over them, but for those "
        "that share the work on a picture",
    )
    group.add_argument(
        "--ulysses", type=whole(1), default=1, metavar="U", help="share tokens by their heads"
    )
    group.add_argument(
        "--ring", type=whole(1), default=1, metavar="R", help="share tokens, keys go round"
    )
    return group


def _add_context_drop(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--context-drop",
        type=int,
        default=1,
        metavar="FACTOR",
        help="side of the squares of tokens over which attention averages its keys, in all layers "
        "at t = 0 and in fewer and fewer towards t = 1; 1 is off",
    )
