"""Pipelines from folders and to folders: what is missing or does not fit is said first."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from pipelines.runs import FAMILIES, distance, draw
from safetensors.torch import load_file, save_file

import lumina
from lumina.pipelines import LuminaPipeline, Pipeline


@pytest.fixture
def copied(folders, tmp_path):
    """A folder of Lumina-Next to break."""
    return Path(shutil.copytree(folders["lumina_next"], tmp_path / "copy"))


@pytest.fixture
def nothing_read(monkeypatch):
    """Fails where the weights of a part are read."""

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    for kind in (transformers.AutoModel, diffusers.AutoencoderKL, diffusers.AutoencoderTiny):
        monkeypatch.setattr(kind, "from_pretrained", refuse)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_diffusers_loads_and_draws(family, folders, ours):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[family])
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == type(ours[family]).__name__
    assert distance(draw(ours[family]), draw(pipe)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_read_again(family, ours, tmp_path):
    """By diffusers and by us; the weights are the same bits."""
    ours[family].save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    expected = draw(ours[family], output_type="pt")
    for load in (Pipeline.from_pretrained, diffusers.DiffusionPipeline.from_pretrained):
        pipe = load(tmp_path / "saved")
        pipe.set_progress_bar_config(disable=True)
        assert distance(draw(pipe, output_type="pt"), expected) < 1e-4
        assert type(pipe).__name__ == type(ours[family]).__name__
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"][0] == "diffusers" and index["vae"] == ["diffusers", "AutoencoderKL"]
    again = Pipeline.from_pretrained(tmp_path / "saved")
    assert again.default_sample_size == ours[family].default_sample_size
    for name in ("transformer", "vae", "text_encoder"):
        state = getattr(again, name).state_dict()
        for key, tensor in getattr(ours[family], name).state_dict().items():
            assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("part", ("text_encoder", "tokenizer", "vae", "scheduler"))
def test_a_part_is_missing(part, copied, nothing_read):
    shutil.rmtree(copied / part)
    where = re.escape(str(copied / part))
    with pytest.raises(FileNotFoundError, match=where) as caught:
        Pipeline.from_pretrained(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ("text_encoder", "vae"))
def test_the_weights_of_a_part_are_missing(part, copied, nothing_read):
    for file in (copied / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{part} has no weights"):
        Pipeline.from_pretrained(copied)
    (copied / part / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        Pipeline.from_pretrained(copied)


def test_weights_without_some_tensors(copied):
    """The libraries would make them up, with a warning."""
    for part, name in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        file = copied / part / f"{name}.safetensors"
        state = load_file(file)
        dropped = sorted(state)[0]
        save_file({key: t for key, t in state.items() if key != dropped}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{part}: the weights lack .*{dropped}"):
            Pipeline.from_pretrained(copied)
        save_file(state, file, {"format": "pt"})
    Pipeline.from_pretrained(copied)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_text_encoder_of_another_width(copied, nothing_read):
    edit(copied / "text_encoder" / "config.json", hidden_size=64)
    message = "text_encoder must give features of width 32, .* got 64 from a GemmaModel"
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(copied)


def test_a_tokenizer_of_another_text_encoder(copied, nothing_read):
    edit(copied / "text_encoder" / "config.json", vocab_size=300)
    with pytest.raises(ValueError, match="tokenizer must be the text encoder's: it has .* of 300"):
        Pipeline.from_pretrained(copied)


def test_a_tokenizer_without_a_template(copied, folders, nothing_read):
    words = transformers.AutoTokenizer.from_pretrained(copied / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer of a ZImagePipeline must have a chat_template"):
        Pipeline.from_pretrained(folders["z_image"], tokenizer=words)


def test_a_tokenizer_that_can_not_pad(copied, nothing_read):
    words = transformers.AutoTokenizer.from_pretrained(copied / "tokenizer")
    words.pad_token = None
    with pytest.raises(ValueError, match="tokenizer must have a pad_token"):
        Pipeline.from_pretrained(copied, tokenizer=words)


def test_parts_of_other_classes(copied, nothing_read):
    edit(copied / "vae" / "config.json", latent_channels=8)
    with pytest.raises(
        ValueError, match="vae must have the transformer's 4 latent channels, got 8"
    ):
        Pipeline.from_pretrained(copied)
    edit(copied / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(ValueError, match="vae must be of an AutoencoderKL or .*, got 'VQModel'"):
        Pipeline.from_pretrained(copied)
    edit(copied / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    vae = diffusers.AutoencoderKL(latent_channels=4)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, got 'DDIMScheduler'"):
        Pipeline.from_pretrained(copied, vae=vae)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", (0, -8, 7, 8.0, "8", True, [8], float("nan")), ids=str)
def test_a_size_that_is_none(family, size, folders, tmp_path, nothing_read):
    folder = Path(shutil.copytree(folders[family], tmp_path / "copy"))
    file = folder / "transformer" / "config.json"
    edit(file, sample_size=size)
    message = f"{file}: sample_size must be a whole multiple of 2 above 0, got {size!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Pipeline.from_pretrained(folder)


def test_no_size(copied, ours):
    edit(copied / "transformer" / "config.json", sample_size=None)
    assert Pipeline.from_pretrained(copied).default_image_size == 1024
    pipe = ours["lumina_next"]
    with pytest.raises(ValueError, match="^sample_size must be a whole multiple of 2 .* got 3"):
        type(pipe)(**pipe.components, sample_size=3)


@pytest.mark.parametrize("file, message, wrong", (
    ("vae/config.json", "vae can not be read", {"block_out_channels": [16]}),
    ("vae/config.json", "vae can not be read", {"block_out_channels": 16}),
    ("vae/config.json", "scaling_factor of the vae must not be 0", {"scaling_factor": 0}),
    ("vae/config.json", "shift_factor of the vae must be finite, got inf",
     {"shift_factor": float("inf")}),
    ("text_encoder/config.json", "text_encoder can not be read", {"num_attention_heads": 0}),
    ("scheduler/scheduler_config.json", "shift of the scheduler must be above 0, got -1",
     {"shift": -1}),
    ("scheduler/scheduler_config.json", "shift of the scheduler must be above 0, got 0",
     {"shift": 0}),
    ("scheduler/scheduler_config.json", "shift of the scheduler must be finite, got nan",
     {"shift": float("nan")}),
    ("scheduler/scheduler_config.json", r"shift_terminal of the scheduler must lie in \[0, 1\)",
     {"shift_terminal": 1}),
    ("scheduler/scheduler_config.json", "below its max_image_seq_len, got 256 and 256",
     {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 256}),
    ("scheduler/scheduler_config.json", "max_shift of the scheduler must be finite, got nan",
     {"use_dynamic_shifting": True, "max_shift": float("nan")}),
), ids=str)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_configs_that_make_no_sense(family, file, message, wrong, folders, tmp_path, nothing_read):
    folder = Path(shutil.copytree(folders[family], tmp_path / "copy"))
    edit(folder / file, **wrong)
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stretched_grid_of_one_step(family, ours):
    pipe = ours[family]
    parts = dict(pipe.components)
    parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config, shift_terminal=0.1)
    made = type(pipe)(**parts)
    made.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="shift_terminal needs at least 2 steps, got 1"):
        draw(made, num_inference_steps=1)
    assert torch.isfinite(draw(made, num_inference_steps=2)).all()


@pytest.mark.parametrize("part", ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"))
@pytest.mark.parametrize("family", FAMILIES)
def test_links_out_of_the_folder(family, part, folders, tmp_path):
    """Of a part or of its config; but to the blobs of a cache, and as a path of the caller's."""
    folder = Path(shutil.copytree(folders[family], tmp_path / "copy"))
    outside = Path(shutil.move(folder / part, tmp_path / "outside"))
    (folder / part).symlink_to(outside)
    with pytest.raises(ValueError, match="must lie in .*, and is a link out of it"):
        Pipeline.from_pretrained(folder)
    Pipeline.from_pretrained(folder, **{part: folder / part})
    (folder / part).unlink()
    shutil.copytree(outside, folder / part)
    name = {"scheduler": "scheduler_config", "tokenizer": "tokenizer_config"}.get(part, "config")
    (folder / part / f"{name}.json").unlink()
    (folder / part / f"{name}.json").symlink_to(outside / f"{name}.json")
    with pytest.raises(ValueError, match=f"{name}.json must lie in .*, and is a link out of it"):
        Pipeline.from_pretrained(folder)


def test_a_cache_of_hugging_face(folders, tmp_path):
    """Every file of a snapshot is a link to the blobs beside it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    for i, file in enumerate(sorted(folders["lumina_next"].rglob("*.*"))):
        shutil.copy(file, blobs / str(i))
        link = snapshot / file.relative_to(folders["lumina_next"])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(i))
    assert type(Pipeline.from_pretrained(snapshot)) is LuminaPipeline


def test_what_is_no_folder_of_a_pipeline(copied, ours, tmp_path, nothing_read):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; `hf download"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="of a LuminaPipeline, it was loaded as a ZImagePipeline"):
        lumina.pipelines.ZImagePipeline.from_pretrained(copied)
    with pytest.raises(TypeError, match="parts are text_encoder, .* got 'unet'"):
        Pipeline.from_pretrained(copied, unet=None)
    (copied / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="text_encoder can not be read") as caught:
        Pipeline.from_pretrained(copied)
    assert "\n" not in str(caught.value)


def test_the_code_of_a_folder_is_not_run(copied, nothing_read):
    """Nor is anyone asked about it."""
    place = copied / "text_encoder"
    code = f"open({str(copied / 'ran')!r}, 'w')\nclass Config: pass\n"
    (place / "own.py").write_text(code)
    edit(place / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(ValueError, match="text_encoder can not be read"):
        Pipeline.from_pretrained(copied)
    assert not (copied / "ran").exists()


def test_weights_alone_and_the_other_parts_from_elsewhere(folders, ours, tmp_path):
    """A single file of ours, or a folder of the original release; the text encoder's folder has
    its tokenizer, as that of a language model does."""
    pipe, parts = ours["lumina_next"], folders["lumina_next"]
    language = Path(shutil.copytree(parts / "text_encoder", tmp_path / "gemma"))
    shutil.copytree(parts / "tokenizer", language, dirs_exist_ok=True)
    file, original = tmp_path / "next.safetensors", tmp_path / "original"
    lumina.save(pipe.transformer, file)
    lumina.save(pipe.transformer, original, format="original")
    for weights in (file, original):
        made = Pipeline.from_pretrained(
            weights, text_encoder=language, vae=pipe.vae, scheduler=parts / "scheduler"
        )
        made.set_progress_bar_config(disable=True)
        assert type(made) is type(pipe) and made.default_image_size == 1024
        got = draw(made, proportional_attn=False, scaling_watershed=None)
        assert torch.equal(got, draw(pipe, proportional_attn=False, scaling_watershed=None))
    made = Pipeline.from_pretrained(original, text_encoder=language, vae=parts / "vae")
    assert made.scheduler.config.shift == 4.0
    with pytest.raises(FileNotFoundError, match="text_encoder does not exist"):
        Pipeline.from_pretrained(original)
    with pytest.raises(FileNotFoundError, match="a pipeline needs its tokenizer"):
        Pipeline.from_pretrained(file, text_encoder=pipe.text_encoder, vae=pipe.vae)


@pytest.mark.parametrize("family", ("lumina2", "z_image"))
def test_a_file_of_comfyui(family, folders, ours, tmp_path):
    """One file for everything there: the network is found in it."""
    pipe, file = ours[family], tmp_path / "network.safetensors"
    lumina.save(pipe.transformer, file, format="comfyui")
    parts = {name: folders[family] / name for name in ("text_encoder", "vae", "tokenizer")}
    made = Pipeline.from_pretrained(file, **parts)
    made.set_progress_bar_config(disable=True)
    assert type(made) is type(pipe)
    assert made.scheduler.config.shift == pipe.scheduler.config.shift  # the released one
    assert torch.equal(draw(made), draw(pipe))


def test_a_part_instead_of_the_folders(folders, ours):
    pipe, folder = ours["lumina_next"], folders["lumina_next"]
    torch.manual_seed(1)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    )
    made = Pipeline.from_pretrained(folder, vae=tiny, transformer=pipe.transformer)
    made.set_progress_bar_config(disable=True)
    assert made.transformer is pipe.transformer and made.vae is tiny
    assert torch.equal(draw(made), draw(pipe))
    picture = draw(made, output_type="pt")
    expected = tiny.decode(draw(pipe)).sample / 2 + 0.5
    assert distance(picture, expected.clamp(0, 1).detach()) < 1e-5
    assert draw(made, image=picture, strength=0.5, output_type="pt").shape == picture.shape


def test_lumina_is_imported_without_the_libraries():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import lumina, lumina.pipelines\n"
        "from lumina import *\n"
        "assert 'LuminaText2ImgPipeline' in dir(lumina.pipelines) and 'Pipeline' in dir(lumina)\n"
        "try: lumina.Pipeline\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        "pipelines need diffusers: pip install diffusers transformers accelerate\n"
    ), done.stderr


def test_names():
    assert lumina.Pipeline is Pipeline
    assert lumina.pipelines.LuminaText2ImgPipeline is LuminaPipeline
    assert lumina.pipelines.Lumina2Text2ImgPipeline is lumina.pipelines.Lumina2Pipeline
    for name in lumina.pipelines.__all__:
        assert getattr(lumina.pipelines, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lumina.pipelines.Nothing  # noqa: B018


WEIGHTS = "diffusion_pytorch_model.safetensors"
