"""`sample` with a pipeline: from prompts to pictures by a released model."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lumina
from lumina.checkpoints.files import read_safetensors
from lumina.emoji.pictures import check_picture, read_picture, save_picture
from lumina.progress import progress
from lumina_kernels.output import check_output

if TYPE_CHECKING:
    from lumina.distributed.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options of `sample` that only pipelines have, as argparse names them.
ONLY_HERE = (
    "negative mask region text_encoder tokenizer vae dtype stages tiled max_sequence_length verbose"
).split()


def has_own_encoder(checkpoint: Path) -> bool:
    """Whether it is a file of ours with the text encoder and no VAE, as the shipped one is."""
    if not checkpoint.is_file():
        return False
    metadata = read_safetensors(checkpoint)[1]
    return metadata.get("format") == "lumina" and "caption_encoder" in metadata


def draw(args, world: World) -> None:
    """Draw with the pipeline of a checkpoint."""
    start = time.perf_counter()
    if world.first:
        check_output(args.out)
    pipe = _pipeline(args, world.device)
    world.share(pipe.transformer)
    height, width = args.size or (pipe.default_image_size,) * 2
    count = len(args.prompts)
    check_picture(args.out, count * width, height)
    options = _options(args, pipe, height, width)
    loaded = time.perf_counter()
    verbose = args.verbose and world.first
    if verbose:
        _say(f"loaded in {loaded - start:.1f} s")
    seeds = [(args.seed + i) % 2**64 for i in range(count)]
    prompts, images = args.prompts[own := world.part(count)], None
    with progress(None, "steps", shown=world.first) as bar:
        if prompts:
            images = pipe(
                prompts, height=height, width=width, output_type="pt",
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[own]],
                callback_on_step_end=lambda *_: bar.update(), **options,
            ).images  # fmt: skip
    images = world.joined(images)
    if images is None:
        return
    seconds = time.perf_counter() - loaded
    save_picture(2 * images.float() - 1, args.out, text="\n".join(args.prompts))
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    print(f"{args.out}: {pictures} of {width}x{height}, {seconds:.1f} s, {type(pipe).__name__}")
    if verbose:
        _say(f"peak memory {_peak(world.device)}")


def _pipeline(args, device: str):
    parts = {
        name: given
        for name in ("text_encoder", "tokenizer", "vae")
        if (given := getattr(args, name)) is not None
    }
    Pipeline = _import()
    pipe = Pipeline.from_pretrained(
        args.checkpoint, dtype=DTYPES[args.dtype or "fp32"], device_map=device,
        stages=bool(args.stages), backend=None if args.backend == "auto" else args.backend, **parts,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    if args.tiled:
        pipe.enable_vae_tiling()
    return pipe


def _options(args, pipe, height: int, width: int) -> dict:
    """Arguments of the call, of which those that were not given are the pipeline's to choose."""
    given = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "solver": args.solver,
        "schedule": args.schedule,
        "negative_prompt": args.negative,
        "max_sequence_length": args.max_sequence_length,
        "strength": args.strength,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if args.guidance_until != 1 or args.guidance_renorm is not None:
        if args.guidance is None:
            raise ValueError("--guidance-until and --guidance-renorm need --guidance")
        options["guidance"] = pipe.guidance_by(
            args.guidance, until=args.guidance_until, renorm=args.guidance_renorm
        )
    if args.rope is not None:
        base = None if args.rope == "none" else pipe.base_size
        options["rope_scaling"] = lumina.RopeScaling(args.rope, base_size=base)
    if args.context_drop != 1:
        options["context_drop"] = lumina.ContextDrop(args.context_drop)
    if args.region:
        options["regions"] = [(_box(box), caption) for box, caption in args.region]
    if args.image is not None:
        options["image"] = (read_picture(args.image, (height, width)) + 1) / 2
    if args.mask is not None:
        mask = read_picture(args.mask, (height, width))
        options["mask_image"] = (mask.mean(0, keepdim=True) + 1) / 2
    return options


def _box(text: str) -> tuple[float, ...]:
    try:
        left, top, right, bottom = (float(n) for n in text.split(","))
    except ValueError:
        raise ValueError(f"--region must be LEFT,TOP,RIGHT,BOTTOM CAPTION, got {text!r}") from None
    return left, top, right, bottom


def _import() -> type:
    """The pipelines, whose libraries take seconds to load, without what these say: a bar for every
    file of weights, and which optional packages they could use."""
    logging.disable(logging.WARNING)
    try:
        import diffusers
        import transformers

        from lumina.pipelines import Pipeline
    finally:
        logging.disable(logging.NOTSET)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    return Pipeline


def _peak(device: str) -> str:
    text = f"{peak_memory() / 2**30:.2f} GiB"
    if torch.device(device).type == "cuda":
        text += f", on the GPU {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return text


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    try:  # the number below may be that of the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    except (OSError, TypeError):
        import resource  # not on every system

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
