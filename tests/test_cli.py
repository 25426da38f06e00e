"""The command line, on a tiny random checkpoint; the shipped one has `test_compact.py`."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CONFIG, run, save_tiny
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import lumina
import lumina_kernels
from lumina import reference
from lumina.cli import main
from lumina.emoji.train import Trainer
from lumina.models.flops import forward_flops

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def draw(checkpoint, out, *arguments):
    assert main(["sample", *arguments, "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    return pixels(out)


def test_sample_draws_what_the_library_draws(checkpoint, tmp_path, capsys):
    prompts = ["a red apple", "ein roter Apfel"]
    options = "--steps 3 --solver heun --schedule sigmoid --guidance 3 --size 64x32 --seed 5"
    picture = draw(checkpoint, tmp_path / "new" / "out.png", *prompts, *options.split())
    assert picture.shape == (32, 2 * 64, 3)
    model, encoder = lumina.load(checkpoint), lumina.load_caption_encoder(checkpoint)
    expected = lumina.sample(
        model, *encoder(prompts), *encoder([""]), size=(32, 64), steps=3, solver="heun",
        schedule="sigmoid", guidance=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        rope_scaling=lumina.RopeScaling("time_aware", base_size=8),
    ).latents  # fmt: skip
    expected = torch.cat(list((expected.clamp(-1, 1) + 1) * 127.5), -1).permute(1, 2, 0)
    assert np.abs(picture - expected.numpy()).max() <= 0.51
    assert "2 pictures" in (said := capsys.readouterr().out) and "NFE 6" in said
    assert Image.open(tmp_path / "new" / "out.png").text["Description"] == "\n".join(prompts)


def test_options_reach_the_sampler(checkpoint, tmp_path):
    base = ["fish", "--steps", "2", "--size", "48x48"]
    plain = draw(checkpoint, tmp_path / "a.png", *base)
    assert (plain == draw(checkpoint, tmp_path / "b.png", *base, "--backend", "torch")).all()
    for change in (
        ["--seed", "1"], ["--guidance", "7"], ["--guidance-until", "0.2"], ["--rope", "none"],
        ["--guidance-renorm", "0.1"], ["--schedule", "rational:9"], ["--solver", "euler"],
        ["--context-drop", "2"],
    ):  # fmt: skip
        other = draw(checkpoint, tmp_path / "c.png", *base, *change)
        assert np.abs(plain - other).mean() > 0.05, change


def test_image_to_image_keeps_the_image(checkpoint, tmp_path):
    picture = torch.zeros(32, 32, 3, dtype=torch.uint8)
    picture[8:24, 4:12] = torch.tensor([255, 128, 0], dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "in.png")
    options = ["fish", "--image", str(tmp_path / "in.png")]
    near = draw(checkpoint, tmp_path / "out.png", *options, "--strength", "0.001")
    far = draw(checkpoint, tmp_path / "out.png", *options, "--strength", "0.8")
    assert (draw(checkpoint, tmp_path / "out.png", *options) == far).all()
    assert np.abs(near - picture.numpy()).mean() < 2
    assert np.abs(far - picture.numpy()).mean() > 20


def test_info_counts(checkpoint, capsys):
    assert main(["info", str(checkpoint), "--size", "32x64", "--text", "7"]) == 0
    said = capsys.readouterr().out
    model = reference.NextDiT(CONFIG)
    assert f"parameters {sum(p.numel() for p in model.parameters()):,}" in said
    with FlopCounterMode(display=False) as counter:
        mask = torch.ones(1, 7, dtype=torch.bool)
        model(torch.randn(1, 3, 64, 32), torch.rand(1), torch.randn(1, 7, 32), mask)
    # The reference repeats k and v of a group before it multiplies, at the same FLOPs.
    assert f"{counter.get_total_flops() / 1e9:.3f} GFLOP" in said
    assert "context drop" not in said


def test_info_tells_what_context_drop_saves(checkpoint, capsys):
    """16 x 16 tokens, 64 of them left, at t = 0 in both layers, in one on average."""
    options = ["--size", "64x64", "--text", "7"]
    assert main(["info", str(checkpoint), *options, "--context-drop", "2"]) == 0
    said = capsys.readouterr().out
    whole = forward_flops(CONFIG, (64, 64), 7)
    saved = 2 * 4 * 256 * 48 * (256 - 64)
    for least, name in ((saved, "at t = 0"), (saved / 2, "on average over t")):
        assert f"{(whole - least) / 1e9:.3f}" in (said.split("context drop 2")[1])
        assert f"{least / whole:.1%} saved" in said and name in said


def test_evaluate_prints_every_figure(checkpoint, capsys):
    options = "--count 5 --others 2 --large 2 --steps 1 --solver euler --context-drop 3".split()
    assert main(["evaluate", "--checkpoint", str(checkpoint), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 14 + 3
    assert "context drop 3" in lines[0]
    assert lines[1].startswith("en: ") and lines[1].endswith(" of 5)")
    assert lines[-1].startswith("en at 64x64, averaged down, RoPE scaling time_aware: ")


def test_train_and_continue(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(lumina.PRESETS, "compact", CONFIG)
    folder = str(tmp_path / "run")
    small = ["--batch", "2", "--naming-batch", "2", "--no-autocast"]
    assert main(["train", folder, "--steps", "2", *small]) == 0
    assert "2 of 2 steps" in capsys.readouterr().out
    assert main(["train", folder, "--steps", "3", *small, "--lr", "0.5"]) == 2
    assert "lr 0.0015 -> 0.5" in capsys.readouterr().err
    assert main(["train", folder, "--steps", "3", *small]) == 0
    said = capsys.readouterr()
    assert "3 of 3 steps" in said.out
    assert said.err == "training from step 2 to 3, 2 pictures each; Ctrl-C saves and stops\n"
    options = ["--checkpoint", f"{folder}/model.safetensors", "--steps", "1"]
    assert main(["sample", "x", *options, "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "x", "--solver", "leapfrog"], "invalid choice: 'leapfrog'"),
        (["sample", "x", "--schedule", "cubic"], "schedule must be one of"),
        (["sample", "x", "--size", "big"], "must be WIDTHxHEIGHT, got 'big'"),
        (["sample", "x", "--size", "33x32"], "multiples of the patch"),
        (["sample", "x", "--steps", "0"], "--steps: must be at least 1, got 0"),
        (["sample", "x", "--steps", "many"], "invalid int value"),
        (["sample", "x", "--backend", "vulkan"], "vulkan"),
        (["sample", "x", "--checkpoint", "/none.safetensors"], "does not exist"),
        (["sample", "x", "--strength", "0.5"], "needs an image"),
        (["sample", "x", "--guidance", "nan"], "guidance scale must be finite"),
        (["sample", "x", "--guidance-until", "nan"], "guidance until must be a time"),
        (["sample", "x", "--context-drop", "0"], "factor must be at least 1, got 0"),
        (["sample"], "required: PROMPT"),
        (["train", "run", "--decay", "linear"], "decay must be one of"),
        (["info", "/none"], "does not exist"),
        (["sample", "x", "--size", "-32x32"], "argument --size: expected one argument"),
        (["sample", "x", "--size=-32x32"], "both positive, got '-32x32'"),
        (["sample", "x", "--size", "32x0"], "both positive, got '32x0'"),
        (["sample", "x", "--size", "99999x99999"], "must be at most 50000000 pixels"),
        (["sample", "x", "--steps", "1" * 30], "must be at most 1000000"),
        (["sample", "x", "--seed", str(2**64)], "--seed: must fit in 64 bits"),
        (["sample", "x", "--seed", str(-(2**63) - 1)], "--seed: must fit in 64 bits"),
        (["sample", "x", "--device", "meta"], "must be cpu or cuda, got 'meta'"),
        (["sample", "x", "--device", "tpu"], "'tpu' cannot be used here: "),
        (["sample", "x", "--out", "x.xyz"], "x.xyz must end in .png or another suffix"),
        (["sample", "x", "--out", "x"], "x must end in .png or another suffix"),
        (["sample", "x", "--out", "/"], "/ is a folder, it must be a file or a new name"),
        (["sample", "x", "--image", "none.png"], "none.png does not exist"),
        (["sample", "x\ny", "--what\never"], "unrecognized arguments: --what ever"),
        (["demo", "--out", "x.xyz"], "x.xyz must end in .png or another suffix"),
        (["evaluate", "--count", "0"], "--count: must be at least 1, got 0"),
        (["evaluate", "--others", "-1"], "--others: must be at least 0, got -1"),
        (["train", "run", "--save-every", "0"], "save_every must be at least 1, got 0"),
        (["train", "run", "--data", "none"], "none/emoji.json does not exist"),
        (["train", "run", "--seed", str(2**64)], "seed must fit in 64 bits"),
        (["prompts", "red aple"], "no name has 'red aple' in it; did you mean 'red apple' or "),
        ([], "required: command"),
    ],
)
def test_bad_arguments_are_one_line(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    if arguments[:1] == ["sample"] and "--checkpoint" not in arguments:
        arguments = [*arguments, "--checkpoint", str(checkpoint)]
    status = run(*arguments)
    said = capsys.readouterr()
    assert status == 2
    assert message in said.err and said.err.count("\n") == 1, said.err
    assert said.err.startswith("python -m lumina") and "error: " in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="without CUDA")
@pytest.mark.parametrize("command", ["sample", "evaluate", "train"])
def test_cuda_where_there_is_none(command, capsys):
    assert run(command, "x", "--device", "cuda") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m lumina {command}: error: ") and said.count("\n") == 1
    if command != "evaluate":  # which takes no "x"
        assert "argument --device: 'cuda' cannot be used here: Torch not compiled" in said


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_seeds_at_the_limits(checkpoint, tmp_path, seed):
    """Two pictures take the seed and the next one, which wraps."""
    options = ["--steps", "1", "--solver", "euler", "--seed"]
    both = draw(checkpoint, tmp_path / "a.png", "x", "x", *options, str(seed))
    second = draw(checkpoint, tmp_path / "a.png", "x", *options, str((seed + 1) % 2**64))
    assert np.abs(both[:, 32:] - second).max() <= 1 < np.abs(both[:, :32] - second).max()
    few = ["--count", "1", "--others", "0", "--large", "0", "--checkpoint", checkpoint]
    assert run("evaluate", *options, seed, *few) == 0


def test_the_path_is_refused_before_the_drawing(checkpoint, tmp_path, monkeypatch, capsys):
    def draws(*_, **settings):
        raise AssertionError("drawn")

    monkeypatch.setattr(lumina, "sample", draws)
    for name in ("a.xyz", "a", ".", "none.png/a.png"):
        (tmp_path / "none.png").touch()
        assert run("sample", "x", "--checkpoint", checkpoint, "--out", tmp_path / name) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_is_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    def save(self, file, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ["sample", "x", "--steps", "1", "--checkpoint", checkpoint, "--out"]
    monkeypatch.setattr("lumina.emoji.pictures.check_picture", lambda *_: None)
    monkeypatch.setattr("lumina.cli.commands.check_picture", lambda *_: None)
    monkeypatch.setattr(Image.Image, "save", save)
    assert run(*arguments, tmp_path / "a.png") == 1
    said = capsys.readouterr().err
    assert said == "python -m lumina sample: error: [Errno 28] No space left on device\n"
    assert os.listdir(tmp_path) == []


def test_ctrl_c_saves_the_run_and_tells_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(lumina.PRESETS, "compact", CONFIG)
    step = Trainer.step

    def interrupted(self):
        if self.done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    folder = tmp_path / "run"
    small = ["--batch", "2", "--naming-batch", "2", "--steps", "9"]
    assert run("train", folder, *small) == 130
    said = capsys.readouterr()
    assert "2 of 9 steps" in said.out and "the same command continues" in said.out
    assert said.err.splitlines()[1:] == ["python -m lumina train: interrupted"]
    assert (folder / "state.pt").exists()


def test_case_and_punctuation_do_not_matter(tmp_path, capsys):
    pictures = []
    for prompt in ("a red apple", " A RED apple! ", "🍎", "purple aple", "Purple, aple?"):
        arguments = [prompt, "--steps", "1", "--solver", "euler", "--out", tmp_path / "a.png"]
        assert run("sample", *arguments) == 0
        pictures.append(pixels(tmp_path / "a.png"))
        said = capsys.readouterr().err
        if "aple" in prompt:
            assert said == (
                f"the model does not know {prompt!r}; did you mean 'red apple' or 'purple heart' "
                "or 'green apple'?\n"
            )
        else:
            assert said == ""
    assert (pictures[0] == pictures[1]).all() and (pictures[3] == pictures[4]).all()
    assert (pictures[0] != pictures[2]).any() and (pictures[0] != pictures[3]).any()
    model = lumina.load(lumina.COMPACT)
    encoder = lumina.load_caption_encoder(lumina.COMPACT)
    settings = lumina.COMPACT_SETTINGS | {"steps": 1, "solver": "euler"}
    scaling = lumina.RopeScaling("time_aware", base_size=4)
    latents = lumina.sample(
        model, *encoder(["a red apple"]), *encoder([""]), size=(32, 32), rope_scaling=scaling,
        generator=[torch.Generator().manual_seed(0)], **settings,
    ).latents  # fmt: skip
    lumina.save_picture(latents, tmp_path / "b.png")
    assert (pixels(tmp_path / "b.png") == pictures[0]).all()


def test_another_checkpoint_reads_the_prompt_as_it_is(checkpoint, tmp_path, capsys):
    options = ["--steps", "1", "--solver", "euler"]
    first = draw(checkpoint, tmp_path / "a.png", "x-y!", *options)
    assert capsys.readouterr().err == ""
    assert (first != draw(checkpoint, tmp_path / "a.png", "x y", *options)).any()


def test_a_long_prompt_warns_in_one_line(checkpoint, tmp_path, capsys):
    draw(checkpoint, tmp_path / "a.png", "x" * 130, "--steps", "1")
    assert capsys.readouterr().err == (
        "python -m lumina sample: warning: a caption is read up to 127 bytes of UTF-8, the rest is "
        f"ignored; '{'x' * 32}...' has 130\n"
    )


def test_prompts_lists_names(capsys):
    assert main(["prompts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 698 and "🍎\ten\tred apple" in lines
    assert main(["prompts", "PFEL!"]) == 0
    assert "🍎\tde\troter apfel" in capsys.readouterr().out.splitlines()


def python(*arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([sys.executable, *arguments], **options)


def test_help_tells_defaults_and_units():
    text = " ".join(python("-m", "lumina", "sample", "--help", check=True).stdout.split())
    assert "unless given, midpoint with the shipped model, else the pipeline's own" in text
    assert "--size WxH in pixels" in text and "(default: auto)" in text
    assert "usage: python -m lumina sample" in text
    script = "import sys; sys.argv[0] = '/bin/lumina'; from lumina.cli import main; main()"
    assert python("-c", script, "--help").stdout.startswith("usage: lumina ")
    version = python("-m", "lumina", "--version", check=True).stdout
    assert version == f"lumina-kernels {lumina_kernels.__version__}, torch {torch.__version__}\n"


def test_what_stdout_cannot_take():
    """A closed pipe is silent, a full disk one line, and another encoding no matter."""
    reader, writer = os.pipe()
    os.close(reader)
    done = python("-m", "lumina", "prompts", capture_output=False, stdout=writer,
                  stderr=subprocess.PIPE)  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    with open("/dev/full", "wb") as full:
        done = python("-m", "lumina", "prompts", capture_output=False, stdout=full,
                      stderr=subprocess.PIPE)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "python -m lumina prompts: error: [Errno 28] No space left on device\n"
    done = python("-m", "lumina", "prompts", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\U0001f34e\ten\tred apple" in done.stdout


@pytest.mark.parametrize(
    "start", [["-m", "lumina"], ["-c", "import sys; from lumina.cli import main; sys.exit(main())"]]
)
def test_ctrl_c_while_pytorch_is_imported(tmp_path, start):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    root = str(Path(lumina.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    done = python(*start, "prompts", env=environment)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == "python -m lumina: interrupted\n"
