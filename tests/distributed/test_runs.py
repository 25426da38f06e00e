"""Runs of `torchrun`: the curve of one process, also after a process was killed; and drawing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import trained_run
from PIL import Image
from processes import launch

import lumina
from lumina.cli import main

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
ROOT = Path(__file__).resolve().parents[2]


def train(processes, run, steps, save_every, *options, dies=False):
    said = run.with_name(f"{run.name} {processes} {steps} {'-'.join(options)}")
    codes, text = launch(processes, said, trained_run.main, run, steps, save_every, *options)
    assert any(codes) == dies, text
    return text


def train_by_torchrun(*arguments):
    """The finished run, in which a process dies, and what the others wrote."""
    start = "-m torch.distributed.run --standalone --nproc-per-node 4".split()
    return subprocess.run(
        [sys.executable, *start, trained_run.__file__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def losses(run):
    if (run / "state.pt").exists():
        return torch.load(run / "state.pt", weights_only=True)["losses"]
    (folder,) = (run / "state").iterdir()  # no older and no half-written one
    return json.loads((folder / "run.json").read_text())["losses"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    train(1, run, 12, 100)
    return run


def assert_same_run(run, alone):
    torch.testing.assert_close(losses(run), losses(alone), rtol=1e-5, atol=1e-6)
    each = [lumina.load(folder / "model.safetensors").state_dict() for folder in (run, alone)]
    for name, value in each[1].items():  # averages, stored as float16
        torch.testing.assert_close(each[0][name], value, rtol=2e-3, atol=1e-4)
    steps = [line.split(",")[0] for line in (run / "log.csv").read_text().splitlines()]
    assert steps == ["step", "10"]


def test_a_killed_process_ends_the_run_and_other_numbers_of_processes_go_on(tmp_path, alone):
    done = train_by_torchrun(tmp_path, 12, 3, "fsdp", "die=5")
    assert time.time() - float((tmp_path / "died").read_text()) < 60 and done.returncode
    assert "cannot reach another one, which has ended" in done.stderr
    assert len(losses(tmp_path)) == 3
    train(2, tmp_path, 12, 3, "fsdp", "ulysses", "die_saving=6", dies=True)
    hidden = [path.name for path in (tmp_path / "state").iterdir() if path.name.startswith(".")]
    assert hidden == [".6.tmp"] and (tmp_path / "state" / "3" / "run.json").exists()
    train(2, tmp_path, 12, 3)  # without shards, over what was left
    assert_same_run(tmp_path, alone)


def test_from_one_process_to_several_and_back(tmp_path, alone):
    train(1, tmp_path, 12, 5, "die=99")
    assert_same_run(tmp_path, alone)
    other = tmp_path / "other"
    train(1, other, 4, 5)
    train(2, other, 8, 5, "fsdp")
    assert not (other / "state.pt").exists() and len(losses(other)) == 8
    assert "torch.distributed is disabled" not in train(1, other, 12, 5)
    assert not (other / "state").exists() and len(losses(other)) == 12


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_many_processes_draw_what_one_does(tmp_path):
    prompts = ["a red apple", "fish", "rocket"]
    options = ["--steps", "2", "--size", "48x32", "--seed", "3", "--out"]
    each = {
        "alone": (1, []),
        "guidance": (2, ["--guidance-parallel"]),
        "all": (4, ["--guidance-parallel", "--ring", "2"]),
        "prompts": (4, []),  # one has nothing to draw
    }
    for name, (processes, more) in each.items():
        out = tmp_path / f"{name}.png"
        command = ["sample", *prompts, *more, *options, str(out)]
        codes, said = launch(processes, tmp_path / name, main, command)
        assert not any(codes), said
        assert said.count("3 pictures") == 1 and "NFE 4" in said
        difference = np.abs(pixels(out) - pixels(tmp_path / "alone.png"))
        assert difference.shape == (32, 3 * 48, 3) and difference.max() <= 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["sample", "x", "--ring", "2", "--guidance-parallel"],
            "= 4 must divide the number",
        ),
        (["train", "RUN", "--fsdp"], "fsdp needs several processes"),
        (["train", "RUN", "--batch", "3", "--accumulate", "4"], "for each of the 4 parts"),
    ],
)
def test_numbers_of_processes_that_do_not_fit(tmp_path, capsys, command, message):
    run = str(tmp_path / "run")
    assert main([run if part == "RUN" else part for part in command]) == 2
    assert message in capsys.readouterr().err
