"""`sample` with the pipelines, on tiny random checkpoints: the pictures are the library's."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from command_line import run, save_tiny
from safetensors.torch import load_file, save_file

import lumina
from lumina.emoji.pictures import read_picture

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import tiny_checkpoint  # noqa: E402

FAMILIES = tuple(tiny_checkpoint.FAMILIES)
PROMPT = "a red apple 🍎 桌子上"
SMALL = ("--steps", "2", "--size", "64x64")
NETWORK = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {family: tiny_checkpoint.write(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def pipes(folders):
    made = {family: lumina.Pipeline.from_pretrained(folder) for family, folder in folders.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A picture to start from, and a mask of its right half."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "image.png")
    mask = PIL.Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save(folder / "mask.png")
    return folder


def drawn(checkpoint, out, *arguments):
    """The pixels that the command line draws."""
    assert run("sample", *arguments, "--checkpoint", checkpoint, "--out", out) == 0
    return np.asarray(PIL.Image.open(out)).astype(int)


def expected(pipe, prompt=PROMPT, seeds=(0,), **arguments):
    """The pixels that the library draws, pictures side by side."""
    given = {"num_inference_steps": 2, "height": 64, "width": 64, **arguments}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(prompt, generator=generators, output_type="np", **given).images
    return np.concatenate(list(images), axis=1) * 255


def assert_same(pixels, wanted):
    assert pixels.shape == wanted.shape
    assert np.abs(pixels - wanted).max() <= 0.51  # of rounding


@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_is_the_librarys(family, folders, pipes, tmp_path, capsys):
    prompts = [PROMPT, "two cats"]
    options = "--steps 3 --size 96x64 --guidance 3 --negative blue --seed 5".split()
    pixels = drawn(folders[family], tmp_path / "new" / "a.png", *prompts, *options)
    said = capsys.readouterr()
    wanted = expected(
        pipes[family], prompts, (5, 6), num_inference_steps=3, width=96, guidance_scale=3.0,
        negative_prompt="blue",
    )  # fmt: skip
    assert_same(pixels, wanted)
    assert "2 pictures of 96x64, " in said.out and type(pipes[family]).__name__ in said.out
    assert said.err == ""
    picture = PIL.Image.open(tmp_path / "new" / "a.png")
    assert picture.text["Description"] == "\n".join(prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_given_the_pipeline_chooses(family, folders, pipes, tmp_path):
    """Also the size, where the tiny checkpoint has one."""
    size = ("--size", "64x64") if family == "z_image" else ()
    pixels = drawn(folders[family], tmp_path / "a.png", PROMPT, *size)
    generator, size = torch.Generator().manual_seed(0), {"height": 64, "width": 64} if size else {}
    images = pipes[family](PROMPT, generator=[generator], output_type="np", **size).images
    assert_same(pixels, images[0] * 255)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("--seed 5", {"seeds": (5,)}),
        ("--steps 4", {"num_inference_steps": 4}),
        ("--negative blue", {"negative_prompt": "blue"}),
        ("--solver heun", {"solver": "heun"}),
        ("--schedule rational:3", {"schedule": "rational:3"}),
        ("--guidance 7", {"guidance_scale": 7.0}),
        ("--guidance 7 --guidance-until 0.5", {"guidance": lumina.Guidance(7, 3, until=0.5)}),
        ("--guidance 7 --guidance-renorm 0.5", {"guidance": lumina.Guidance(7, 3, renorm=0.5)}),
        ("--size 96x96 --rope ntk",
         {"width": 96, "height": 96, "rope_scaling": lumina.RopeScaling("ntk", base_size=4)}),
        ("--size 96x64 --rope none", {"width": 96, "rope_scaling": lumina.RopeScaling("none")}),
        ("--context-drop 2", {"context_drop": lumina.ContextDrop(2)}),
        ("--region 0,0,0.5,1 cat --region 0.5,0,1,1 dog",
         {"regions": [((0, 0, 0.5, 1), "cat"), ((0.5, 0, 1, 1), "dog")]}),
        ("--image image.png", {"image": "image.png"}),
        ("--image image.png --strength 0.3", {"image": "image.png", "strength": 0.3}),
        ("--image image.png --mask mask.png", {"image": "image.png", "mask_image": "mask.png"}),
        ("--image image.png --mask mask.png --strength 0.5",
         {"image": "image.png", "mask_image": "mask.png", "strength": 0.5}),
    ],
)  # fmt: skip
def test_options_reach_the_pipeline(
    options, arguments, folders, pipes, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(files)
    pixels = drawn(folders["lumina_next"], tmp_path / "a.png", PROMPT, *SMALL, *options.split())
    size = (arguments.get("height", 64), arguments.get("width", 64))
    if "image" in arguments:
        arguments = {**arguments, "image": (read_picture("image.png", size) + 1) / 2}
    if "mask_image" in arguments:
        arguments["mask_image"] = PIL.Image.open("mask.png")
    assert_same(pixels, expected(pipes["lumina_next"], **arguments))
    plain = expected(pipes["lumina_next"], height=size[0], width=size[1])
    assert np.abs(pixels - plain).mean() > 0.5


def test_masks_of_other_kinds(folders, files, tmp_path):
    """Grey of 16 bits counts as grey, and what is transparent is drawn anew."""
    image = ("--image", files / "image.png")
    wanted = drawn(folders["lumina_next"], tmp_path / "a.png", PROMPT, *SMALL, *image, "--mask",
                   files / "mask.png")  # fmt: skip
    deep = np.full((64, 64), 30000, dtype=np.uint16)  # darker than half
    deep[:, 32:] = 40000
    clear = np.zeros((64, 64, 2), dtype=np.uint8)  # black, and its alpha
    clear[:, :32, 1] = 255
    for i, kind in enumerate((deep, clear)):
        mask = tmp_path / f"{i}.png"
        PIL.Image.fromarray(kind).save(mask)
        options = [*SMALL, *image, "--mask", mask]
        pixels = drawn(folders["lumina_next"], tmp_path / "b.png", PROMPT, *options)
        assert (pixels == wanted).all()


@pytest.mark.parametrize("family", ("lumina2", "z_image"))
def test_guidance_of_all_channels(family, folders, pipes, tmp_path):
    options = "--guidance 7 --guidance-until 0.5 --guidance-renorm 1".split()
    pixels = drawn(folders[family], tmp_path / "a.png", PROMPT, *SMALL, *options)
    scale = 8 if family == "z_image" else 7  # there it comes on top of the caption alone
    rule = lumina.Guidance(scale, until=0.5, renorm=1.0)
    assert_same(pixels, expected(pipes[family], guidance=rule))
    loose = ["--guidance", "7", "--guidance-until", "0.999"]  # bounds nothing
    pixels = drawn(folders[family], tmp_path / "b.png", PROMPT, *SMALL, *loose)
    assert_same(pixels, expected(pipes[family], guidance_scale=7.0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtypes(family, name, dtype, folders, pipes, tmp_path):
    pixels = drawn(folders[family], tmp_path / "a.png", PROMPT, *SMALL, "--dtype", name)
    pipe = lumina.Pipeline.from_pretrained(folders[family], dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.pad_token.dtype == dtype if family == "lumina_next" else True
    wanted = expected(pipe)
    assert_same(pixels, wanted)
    assert 0 < np.abs(wanted - expected(pipes[family])).mean()


def test_tiles_stages_and_what_is_told(folders, pipes, tmp_path, monkeypatch, capsys):
    """Stages change the memory alone: the parts have none before and after the call."""
    used = []
    keep = lumina.Pipeline.use_stages
    monkeypatch.setattr(
        lumina.Pipeline, "use_stages", lambda pipe, *args: (used.append(pipe), keep(pipe, *args))
    )
    options = "--size 192x64 --tiled --stages --verbose".split()
    pixels = drawn(folders["lumina_next"], tmp_path / "a.png", PROMPT, *SMALL, *options)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[:2] for line in said] == [["loaded", "in"], ["peak", "memory"]]
    assert said[1].endswith(" GiB") and 0 < float(said[1].split()[2]) < 100
    (staged,) = used
    parts = (staged.text_encoder, staged.transformer, staged.vae)
    assert all(p.device.type == "meta" for part in parts for p in part.parameters())
    pipe = pipes["lumina_next"]
    whole = expected(pipe, width=192)
    pipe.enable_vae_tiling()
    try:
        assert_same(pixels, expected(pipe, width=192))
    finally:
        pipe.vae.disable_tiling()
    assert np.abs(pixels - whole).mean() > 0.1


def test_a_long_prompt_is_cut_with_one_line(folders, pipes, tmp_path, capsys):
    limit = ("--max-sequence-length", "3")
    pixels = drawn(folders["lumina_next"], tmp_path / "a.png", PROMPT, *SMALL, *limit)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "warning: a prompt is cut to 3 of " in said
    with pytest.warns(UserWarning, match="a prompt is cut to 3"):
        assert_same(pixels, expected(pipes["lumina_next"], max_sequence_length=3))
    assert np.abs(pixels - expected(pipes["lumina_next"])).mean() > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_come_alone(family, folders, pipes, tmp_path):
    """In a file, as ComfyUI or we store them; the size is the released models'."""
    weights, folder = tmp_path / "network.safetensors", folders[family]
    format = "lumina" if family == "lumina_next" else "comfyui"
    lumina.save(pipes[family].transformer, weights, format=format)
    parts = ["--text-encoder", folder / "text_encoder", "--vae", folder / "vae"]
    options = [*SMALL, "--tokenizer", folder / "tokenizer"]
    pixels = drawn(weights, tmp_path / "a.png", PROMPT, *options, *parts)
    made = lumina.Pipeline.from_pretrained(
        weights, **{name: folder / name for name in ("text_encoder", "vae", "tokenizer")}
    )
    made.set_progress_bar_config(disable=True)
    assert_same(pixels, expected(made))
    parts[1] = shutil.copytree(folder / "text_encoder", tmp_path / "language")
    shutil.copytree(folder / "tokenizer", parts[1], dirs_exist_ok=True)
    assert (pixels == drawn(weights, tmp_path / "b.png", PROMPT, *SMALL, *parts)).all()


def refused(capsys, *arguments, status=2):
    """What the one line on stderr says; nothing is left behind."""
    before = sorted(os.listdir())
    assert run("sample", "a", *arguments) == status
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said.err
    assert said.err.startswith("python -m lumina sample: error: "), said.err
    assert sorted(os.listdir()) == before
    return said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--size 40x64", "width must be a whole multiple of 16 pixels, got 40"),
        ("--size 64x65", "height must be a whole multiple of 16 pixels, got 65"),
        ("--region 0,0,1 cat", "--region must be LEFT,TOP,RIGHT,BOTTOM CAPTION, got '0,0,1'"),
        ("--region 0,0,1,x cat", "--region must be LEFT,TOP,RIGHT,BOTTOM CAPTION, got '0,0,1,x'"),
        ("--region 1,0,0,1 cat", "a box must be left,top,right,bottom"),
        ("--region 0,0,nan,1 cat", "a box must be left,top,right,bottom"),
        ("--region 0,0,0.01,1 cat", "holds no token"),
        ("--mask mask.png", "strength and mask_image need an image"),
        ("--strength 0.5", "strength and mask_image need an image"),
        ("--image image.png --strength 0", "strength must lie in (0, 1], got 0"),
        ("--image image.png --strength nan", "strength must lie in (0, 1], got nan"),
        ("--image none.png", "none.png does not exist"),
        ("--image text.txt", "text.txt is not a picture"),
        ("--image image.png --mask text.txt", "text.txt is not a picture"),
        ("--guidance nan", "guidance_scale must be finite, got nan"),
        ("--guidance inf", "guidance_scale must be finite, got inf"),
        ("--guidance-until 0.5", "--guidance-until and --guidance-renorm need --guidance"),
        ("--guidance 3 --guidance-until nan", "guidance until must be a time, got nan"),
        ("--guidance 3 --guidance-renorm 0", "guidance renorm must be positive, got 0"),
        ("--schedule cubic", "schedule must be one of"),
        ("--context-drop 0", "factor must be at least 1, got 0"),
        ("--backend vulkan", "vulkan"),
        ("--out a.xyz", "a.xyz must end in .png"),
        ("--vae text.txt", "text.txt does not exist: a pipeline needs its vae"),
        ("--text-encoder none", "none does not exist: a pipeline needs its text_encoder"),
        ("--tokenizer none", "none does not exist: a pipeline needs its tokenizer"),
    ],
)
def test_bad_arguments(arguments, message, folders, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(files, tmp_path / "here"))
    Path("text.txt").write_text("no picture")
    given = ["--checkpoint", folders["lumina_next"], "--steps", "1", *arguments.split()]
    assert message in refused(capsys, *given)


@pytest.mark.parametrize(
    "family, message",
    [
        ("lumina_next", "regions are of one picture: give one prompt and one size"),
        ("lumina2", "regions are for Lumina-Next, this is a "),
        ("z_image", "regions are for Lumina-Next, this is a "),
    ],
)
def test_refused_regions(family, message, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["b", *SMALL, "--checkpoint", folders[family], "--region", "0,0,0.5,1", "cat"]
    assert message in refused(capsys, *given)


@pytest.mark.parametrize("part", ("text_encoder", "tokenizer", "vae", "scheduler", "transformer"))
def test_a_part_of_the_folder_is_missing(part, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(folders["lumina2"], tmp_path / "copy"))
    shutil.rmtree(copy / part)
    assert part in refused(capsys, *SMALL, "--checkpoint", copy)


def test_weights_alone_need_the_parts(pipes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lumina.save(pipes["lumina2"].transformer, "network.safetensors", format="comfyui")
    said = refused(capsys, *SMALL, "--checkpoint", "network.safetensors")
    assert "text_encoder does not exist: a pipeline needs its text_encoder" in said
    assert "does not exist" in refused(capsys, "--checkpoint", "nothing")


def test_options_of_pipelines_with_a_model_that_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours = save_tiny(tmp_path / "ours.safetensors")
    for option in (
        "--negative a", "--mask a", "--region 0,0,1,1 a", "--text-encoder a", "--tokenizer a",
        "--vae a", "--dtype bf16", "--stages", "--tiled", "--max-sequence-length 9", "--verbose",
    ):  # fmt: skip
        for checkpoint in (lumina.COMPACT, ours):
            said = refused(capsys, "--checkpoint", checkpoint, *option.split())
            assert f"{option.split()[0]} is for pipelines, {checkpoint} has none" in said


def test_weights_of_nan_fail_in_one_line(folders, tmp_path, monkeypatch, capsys):
    """And write no black picture."""
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(folders["lumina_next"], tmp_path / "copy"))
    state = load_file(copy / "vae" / NETWORK)
    state["decoder.conv_out.bias"][0] = float("nan")
    save_file(state, copy / "vae" / NETWORK, {"format": "pt"})
    said = refused(capsys, *SMALL, "--checkpoint", copy, status=1)
    assert "the VAE overflows in torch.float32" in said
