"""Pictures from files and into files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lumina_kernels.output import check_output, replace

# Ranges that pictures of numbers come in: fractions, and what fits in 8 and in 16 bits.
TOPS = (1, 255, 65535)


def to_float(images: Tensor) -> Tensor:
    """`images / 127.5 - 1`: uint8 of any shape to float32 in [-1, 1].

    Raises TypeError for another dtype.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """`round((x + 1) * 127.5)` clipped to 0..255: floats of any shape to uint8, undoes `to_float`.

    Raises TypeError for a dtype that is not floating, ValueError for NaN and infinity.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    x = x.detach().float()
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"x must be finite, got {bad} values of {x.numel()} that are not")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The picture in a file; whatever Pillow raises meanwhile is a ValueError that names the file.

    Raises FileNotFoundError where nothing is there.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    if not os.path.isfile(path):  # opening a FIFO waits, and some devices never end
        raise ValueError(f"{path} is not a file")
    try:
        with Image.open(path) as picture:
            yield picture
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise ValueError(f"{path} is too large: a picture has at most {most} pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture in a format that Pillow reads") from None
    except Exception as error:  # damaged files make its readers raise nearly anything
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def read_picture(path: str | os.PathLike, size: tuple[int, int]) -> Tensor:
    """A picture file as (3, H, W) in [-1, 1], scaled to `size` = (H, W).

    It is turned as its EXIF says, what is transparent shows white, and of an animation the first
    frame is taken. Grey pictures of 16 bits or of floats keep their precision; the white of floats
    is 1, 255 or 65535, the least that holds them all.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no picture, damaged, of more than 179 million pixels, or of floats that
            are negative, not finite or beyond 65535.
    """
    with opened(Path(path)) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            grey = Image.fromarray(_grey(picture)).resize(size[::-1], Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(grey)).clamp(0, 1)
            return (2 * pixels - 1).expand(3, *size).clone()
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return to_float(pixels.reshape(*size, 3).permute(2, 0, 1))


def _grey(picture: Image.Image) -> np.ndarray:
    """A picture of numbers as float32 in [0, 1]."""
    numbers = np.asarray(picture)
    if numbers.dtype == np.float32 and not np.isfinite(numbers).all():
        raise ValueError("some of its numbers are not finite")
    low, high = numbers.min(), numbers.max()
    if low < 0 or high > TOPS[-1]:
        raise ValueError(f"its numbers must lie in [0, {TOPS[-1]}], got {low} to {high}")
    tops = TOPS if picture.mode == "F" else TOPS[-1:]
    grey = (numbers / next(top for top in tops if high <= top)).astype(np.float32)
    transparent = picture.info.get("transparency")
    return grey if transparent is None else np.where(numbers == transparent, np.float32(1), grey)


def save_picture(
    pictures: Tensor | Sequence[Tensor],
    path: str | os.PathLike,
    *,
    columns: int | None = None,
    scale: int = 1,
    text: str = "",
) -> None:
    """Write RGB pictures in [-1, 1], such as the `latents` of `sample`, as one picture file.

    Values beyond are clipped. The pictures lie side by side, on white where they differ in size.

    Args:
        pictures: (3, H, W), or (B, 3, H, W), or a list of (3, H_i, W_i); floating.
        path: its suffix says the format, one that Pillow writes and reads. Folders are made. A
            FIFO or character device without a suffix gets a PNG.
        columns: pictures in a row; None: all.
        scale: side of the square that a pixel becomes.
        text: Description in a PNG.

    Raises:
        TypeError: the pictures are not floating.
        ValueError: another shape, no pictures, values that are not finite, or a path that
            `check_picture` refuses.
        OSError: from the system; what was at `path` is still there.
    """
    path = Path(path)
    if isinstance(pictures, Tensor) and pictures.ndim == 3:
        pictures = [pictures]
    shapes = [tuple(picture.shape) for picture in pictures]
    if not shapes or any(len(s) != 3 or s[0] != 3 or 0 in s for s in shapes):
        raise ValueError(f"pictures must be RGB, each (3, H, W), got {shapes}")
    columns = columns or len(shapes)
    H, W = (scale * max(side) for side in list(zip(*shapes, strict=True))[1:])
    sheet = Image.new("RGB", (columns * W, -(-len(shapes) // columns) * H), "white")
    check_picture(path, *sheet.size)
    for i, picture in enumerate(pictures):
        image = Image.fromarray(to_uint8(picture).cpu().permute(1, 2, 0).numpy())
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        sheet.paste(image, (i % columns * W, i // columns * H))
    options = {}
    if text and _format(path) == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("Description", text)
    replace(path, lambda file: sheet.save(file, format=_format(path), **options))


def check_picture(path: Path, width: int, height: int) -> None:
    """Refuse a path that `save_picture` could not write, before the pictures are drawn.

    Raises:
        ValueError: its suffix is not that of a format that holds width x height RGB pixels, or
            there is something else than a file, FIFO or character device.
        OSError: nothing can be written there.
    """
    check_output(path)
    name = _format(path)
    blank, trial = Image.new("RGB", (width, height), "white"), io.BytesIO()
    try:
        blank.save(trial, format=name)
        with Image.open(trial) as again:
            kept = again.size == blank.size  # icons come in sizes of their own
    except Exception as error:  # formats refuse sizes and modes each in its own way
        raise ValueError(f"{path}: {name} takes no picture of {width}x{height}: {error}") from error
    if not kept:
        raise ValueError(f"{path}: {name} does not keep the size of a picture of {width}x{height}")


def _format(path: Path) -> str:
    """Pillow's name of the format that a path's suffix asks for."""
    Image.init()
    suffix = path.suffix.lower()
    if not suffix and path.exists() and not path.is_file():
        return "PNG"
    name = Image.registered_extensions().get(suffix)
    if name not in Image.SAVE or name not in Image.OPEN:
        raise ValueError(
            f"{path} must end in .png or another suffix that Pillow writes, got {suffix!r}"
        )
    return name
