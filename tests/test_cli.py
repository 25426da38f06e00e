"""The command line, on a tiny random checkpoint; the shipped one has `test_compact.py`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import lumina
from lumina import reference
from lumina.cli import main
from lumina.emoji.encoder import CaptionEncoder
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.next_dit.flops import forward_flops

CONFIG = NextDiTConfig(
    patch_size=4, in_channels=3, dim=48, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=16,
    learn_sigma=False, cap_feat_dim=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    torch.manual_seed(1)
    model, encoder = lumina.NextDiT(CONFIG), CaptionEncoder(32, 16, 2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    lumina.save(model, path, caption_encoder=encoder, metadata={"base_size": "8"})
    return path


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
    options = ["fish", "--image", str(tmp_path / "in.png"), "--strength"]
    near = draw(checkpoint, tmp_path / "out.png", *options, "0.001")
    far = draw(checkpoint, tmp_path / "out.png", *options, "0.9")
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
    run = str(tmp_path / "run")
    small = ["--batch", "2", "--naming-batch", "2", "--no-autocast"]
    assert main(["train", run, "--steps", "2", *small]) == 0
    assert "2 of 2 steps" in capsys.readouterr().out
    assert main(["train", run, "--steps", "3", *small]) == 2
    assert "steps 2 -> 3" in capsys.readouterr().err
    options = ["--checkpoint", f"{run}/model.safetensors", "--steps", "1"]
    assert main(["sample", "x", *options, "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "x", "--solver", "leapfrog"], "invalid choice: 'leapfrog'"),
        (["sample", "x", "--schedule", "cubic"], "schedule must be one of"),
        (["sample", "x", "--size", "big"], "must be WIDTHxHEIGHT, got 'big'"),
        (["sample", "x", "--size", "33x32"], "multiples of the patch"),
        (["sample", "x", "--steps", "0"], "steps must be at least 1, got 0"),
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
        ([], "required: command"),
    ],
)
def test_bad_arguments_are_one_line(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    if arguments[:1] == ["sample"] and "--checkpoint" not in arguments:
        arguments = [*arguments, "--checkpoint", str(checkpoint)]
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    assert message in said.err and said.err.count("\n") == 1, said.err
    assert list(tmp_path.iterdir()) == []


def test_help_tells_defaults_and_units():
    text = subprocess.run(
        [sys.executable, "-m", "lumina", "sample", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "(default: midpoint)" in text and "in pixels" in text
