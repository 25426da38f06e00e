"""Pictures from files of every kind, and into files of every format that keeps them."""

import io
import os
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import lumina
from lumina.emoji.pictures import check_picture, read_picture, save_picture, to_float, to_uint8

RAMP = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)


def test_float_and_back_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[255] == 1
    assert torch.equal(to_uint8(floats), levels)
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], requires_grad=True)
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(x.bfloat16()).tolist() == [0, 0, 128, 255, 255]


def test_conversions_refuse_what_has_no_answer():
    with pytest.raises(TypeError, match="must be uint8, got torch.float32"):
        to_float(torch.zeros(3))
    with pytest.raises(TypeError, match="must be floating point, got torch.int64"):
        to_uint8(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 2 values of 3"):
        to_uint8(torch.tensor([0.0, float("nan"), float("inf")]))


def corners():
    """8 x 6 pixels, every quarter in a colour of its own."""
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:3, :4], pixels[:3, 4:], pixels[3:, :4] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def expected(image):
    return to_float(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def half_transparent(mode):
    """Left transparent (and black underneath), right opaque, of grey 51 or the like."""
    pixels = np.zeros((4, 8, 4), np.uint8)
    pixels[:, 4:] = (51, 51, 51, 255)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("P")
        flat = np.full((4, 8), 1, np.uint8)
        flat[:, :4] = 0
        image = Image.fromarray(flat).convert("P")
        image.putpalette([0, 0, 0, 51, 51, 51])
        image.info["transparency"] = 0
        return image
    if mode in ("RGB", "L"):  # one colour of the file stands for nothing
        image = image.convert(mode)
        image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_shows_white(tmp_path, mode):
    image = half_transparent(mode)
    image.save(tmp_path / "a.png", **{k: image.info[k] for k in image.info if k == "transparency"})
    picture = read_picture(tmp_path / "a.png", (4, 8))
    assert (picture[:, :, :4] == 1).all()
    assert torch.equal(picture[:, :, 4:], torch.full((3, 4, 4), 51 / 127.5 - 1))


def test_half_transparency_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert torch.equal(read_picture(tmp_path / "a.png", (4, 4)), torch.full((3, 4, 4), 0.6))


def test_transparency_is_composed_before_the_scaling(tmp_path):
    """What lies underneath, here black, is in no border."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 4, 8))
    image.save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", (3, 3)) == 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners().save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        turned = ImageOps.exif_transpose(image)
    assert turned.size == ((8, 6) if orientation < 5 else (6, 8))
    picture = read_picture(tmp_path / "a.png", turned.size[::-1])
    assert torch.equal(picture, expected(turned))
    assert torch.equal(picture, expected(corners())) == (orientation == 1)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.n_frames == 3
    picture = read_picture(tmp_path / f"a.{suffix}", (8, 8))
    assert torch.equal(picture, expected(frames[0]))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_keep_their_range(tmp_path, name):
    numbers = (RAMP * 65535).round().astype(np.uint16)
    Image.fromarray(numbers).save(tmp_path / name)
    picture = read_picture(tmp_path / name, (32, 32))
    wanted = torch.from_numpy(numbers.astype(np.float32)) / 65535 * 2 - 1
    torch.testing.assert_close(picture, wanted.expand(3, 32, 32), rtol=0, atol=1e-6)
    assert picture.unique().numel() == 1024  # 8 bits have 256


def test_16_bit_transparency(tmp_path):
    numbers = np.full((4, 4), 30000, np.uint16)
    numbers[0] = 100
    Image.fromarray(numbers).save(tmp_path / "a.png", transparency=100)
    picture = read_picture(tmp_path / "a.png", (4, 4))
    assert (picture[:, 0] == 1).all()
    assert picture[:, 1:].unique().tolist() == pytest.approx([2 * 30000 / 65535 - 1])


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_floats_keep_their_range(tmp_path, top):
    Image.fromarray(RAMP * top).save(tmp_path / "a.tif")
    picture = read_picture(tmp_path / "a.tif", (32, 32))
    wanted = (torch.from_numpy(RAMP) * 2 - 1).expand(3, 32, 32)
    torch.testing.assert_close(picture, wanted, rtol=0, atol=1e-6)
    assert picture.unique().numel() == 1024


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_other_modes_are_colours(tmp_path, mode):
    image = corners().convert(mode)
    image.save(tmp_path / "a.tif")
    assert torch.equal(read_picture(tmp_path / "a.tif", (6, 8)), expected(image))


def bad_files(folder):
    whole = io.BytesIO()
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(whole, format="PNG")
    (folder / "cut.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    for name, value in (("nan", np.nan), ("inf", np.inf), ("negative", -1), ("huge", 1e9)):
        Image.fromarray(np.full((4, 4), value, np.float32)).save(folder / f"{name}.tif")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 400 megapixels in 50 kB


def test_what_is_refused(tmp_path):
    bad_files(tmp_path)
    for name, message in {
        "cut.png": "cannot be read as a picture: ",
        "empty.png": "is not a picture in a format that Pillow reads",
        "text.png": "is not a picture in a format that Pillow reads",
        "folder.png": "is not a file",
        "fifo.png": "is not a file",
        "nan.tif": "cannot be read as a picture: some of its numbers are not finite",
        "inf.tif": "cannot be read as a picture: some of its numbers are not finite",
        "negative.tif": "its numbers must lie in [0, 65535], got -1.0 to -1.0",
        "huge.tif": "its numbers must lie in [0, 65535], got 1000000000.0 to 1000000000.0",
        "bomb.png": "is too large: a picture has at most 178956970 pixels",
    }.items():
        with pytest.raises(ValueError) as error:
            read_picture(tmp_path / name, (8, 8))
        assert str(error.value).startswith(str(tmp_path / name)) and message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.png does not exist"):
        read_picture(tmp_path / "none.png", (8, 8))


def test_bytes_of_any_kind_are_a_picture_or_a_value_error(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a"
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        whole = io.BytesIO()
        corners().resize((40, 30)).save(whole, format=kind)
        for _ in range(25):
            damaged = np.frombuffer(whole.getvalue(), np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(damaged[: rng.integers(len(damaged) // 2, len(damaged) + 1)].tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about what it skips
                try:
                    assert read_picture(path, (6, 8)).abs().max() <= 1
                except ValueError as error:
                    assert str(path) in str(error)


def test_latents_become_the_picture(tmp_path):
    latents = torch.rand(3, 3, 5, 7) * 2.4 - 1.2
    assert lumina.save_picture is save_picture
    lumina.save_picture(latents, tmp_path / "new" / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "a.png"))
    wanted = torch.cat(list(((latents.clamp(-1, 1) + 1) * 127.5).round()), -1).permute(1, 2, 0)
    assert pixels.shape == (5, 21, 3) and (pixels == wanted.numpy()).all()
    lumina.save_picture(latents[0], tmp_path / "one.png", text="größer")
    with Image.open(tmp_path / "one.png") as one:
        assert (np.asarray(one) == pixels[:, :7]).all() and one.text["Description"] == "größer"


def test_pictures_of_different_sizes_lie_on_white(tmp_path):
    pictures = [
        -torch.ones(3, 4, 6),
        -torch.ones(3, 2, 3, dtype=torch.float64),
        -torch.ones(3, 4, 1),
    ]
    save_picture(pictures, tmp_path / "a.png", columns=2, scale=2)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    wanted = np.full((16, 24, 3), 255, np.uint8)
    wanted[:8, :12] = wanted[:4, 12:18] = wanted[8:, :2] = 0
    assert (pixels == wanted).all()


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "ppm", "tif", "webp", "jpg", "tga"])
def test_the_suffix_is_the_format(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    save_picture(torch.zeros(3, 16, 16), path, text="a text")
    with Image.open(path) as image:
        assert image.format == Image.registered_extensions()[f".{suffix.lower()}"]
    assert np.abs(np.asarray(Image.open(path)).astype(int) - 128).max() <= 1


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.png.gz", "a.pdf", "a.xbm", "a.psd", ".png"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        save_picture(torch.zeros(3, 8, 8), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_size_that_the_format_lacks_is_refused(tmp_path):
    for name, size, message in (
        ("a.webp", (20_000, 8), "WEBP takes no picture of 20000x8: "),
        ("a.jpg", (70_000, 8), "JPEG takes no picture of 70000x8: "),
        ("a.ico", (300, 300), "ICO does not keep the size of a picture of 300x300"),
    ):
        with pytest.raises(ValueError, match=message):
            check_picture(tmp_path / name, *size)


@pytest.mark.parametrize("name", ["fifo", "fifo.png"])
def test_a_fifo_gets_a_png(tmp_path, name):
    path, found = tmp_path / name, []
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    thread.start()
    save_picture(torch.zeros(3, 8, 8), path)
    thread.join(10)
    with Image.open(io.BytesIO(found[0])) as image:
        assert image.format == "PNG" and image.size == (8, 8)
    assert path.is_fifo()


def test_what_is_no_rgb_picture_is_refused(tmp_path):
    for shape in ((4, 8, 8), (1, 4, 8, 8), (0, 3, 8, 8), (3, 0, 8), (8, 8), (2, 3, 2, 8, 8)):
        with pytest.raises(ValueError, match=r"pictures must be RGB, each \(3, H, W\), got \["):
            save_picture(torch.zeros(shape), tmp_path / "a.png")
    with pytest.raises(TypeError, match="floating point, got torch.uint8"):
        save_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "a.png")
    with pytest.raises(ValueError, match="got 192 values of 192 that are not"):
        save_picture(torch.full((3, 8, 8), torch.nan), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []
