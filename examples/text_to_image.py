"""From prompts to pictures in samples/pipelines/: Lumina-Next, Lumina-Image 2.0 and Z-Image.

python examples/text_to_image.py: tiny random checkpoints, written on the spot; pictures of noise.
python examples/text_to_image.py FOLDER "a prompt": a checkpoint of any of the three.
"""

import sys
import tempfile
from pathlib import Path

import tiny_checkpoint
import torch

import lumina

OUT = Path("samples/pipelines")


def draw(folder: str | Path, prompt: str, **size):
    """A picture, in three lines."""
    pipe = lumina.Pipeline.from_pretrained(folder)
    image = pipe(prompt, **size, generator=torch.Generator().manual_seed(0)).images[0]
    image.save(OUT / f"{type(pipe).__name__}.png")
    return pipe, image.width


def watched(pipe, prompt: str, side: int) -> torch.Tensor:
    """The latents at the end, and after each step how large they are."""

    def after_step(pipe, i, timestep, tensors):
        print(f"  step {i} at {timestep:.0f}: latents up to {tensors['latents'].abs().max():.2f}")

    options = {"width": side, "height": side, "num_inference_steps": 4, "output_type": "latent"}
    return pipe(prompt, callback_on_step_end=after_step, **options).images


def several_sizes(pipe, prompt: str, side: int) -> None:
    """Pictures of three sizes in one batch; the positions of the largest are stretched."""
    tokens = side // pipe.vae_scale_factor // pipe.patch_size  # along a side in training
    scaling = lumina.RopeScaling("ntk", base_size=tokens)
    sizes = {"width": [side, 2 * side, side], "height": [side, side, side // 2]}
    images = pipe([prompt] * 3, **sizes, rope_scaling=scaling, schedule="rational:4").images
    for image in images:
        image.save(OUT / f"{type(pipe).__name__}-{image.width}x{image.height}.png")


def everything(folder: str | Path, prompt: str, **size) -> None:
    pipe, side = draw(folder, prompt, **size)
    print(f"{type(pipe).__name__}: latents {tuple(watched(pipe, prompt, side).shape)}")
    several_sizes(pipe, prompt, side)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) == 3:
        sys.exit(everything(*sys.argv[1:]))
    for family in tiny_checkpoint.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tiny_checkpoint.write(family, folder)
            everything(folder, "a red apple, 红苹果 🍎", width=64, height=64)
