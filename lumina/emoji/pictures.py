"""Pictures from files and into files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lumina.checkpoints.files import replace
from lumina.emoji.data import to_float, to_uint8


def read_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture file as (3, H, W) in [-1, 1], scaled to `size` = (H, W)."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return to_float(pixels.reshape(*size, 3).permute(2, 0, 1))


def write_png(pictures: Tensor, path: Path, columns: int, text: str, scale: int = 1) -> None:
    """Write (N, 3, H, W) in [-1, 1] as one PNG, row by row, with `text` as its Description."""
    N, C, H, W = pictures.shape
    rows = -(-N // columns)
    sheet = torch.full((rows * columns, C, H, W), 255, dtype=torch.uint8)
    sheet[:N] = to_uint8(pictures).cpu()
    sheet = sheet.reshape(rows, columns, C, H, W).permute(0, 3, 1, 4, 2)
    image = Image.fromarray(sheet.reshape(rows * H, columns * W, C).numpy())
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    info = PngInfo()
    info.add_itxt("Description", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: image.save(file, format="PNG", pnginfo=info))
