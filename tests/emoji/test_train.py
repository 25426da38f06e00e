"""Training: the losses, the rate, and above all that an interrupted run loses nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import lumina
from lumina.emoji import train as training
from lumina.emoji.data import EmojiSet
from lumina.emoji.pictures import to_float
from lumina.emoji.train import TrainConfig, Trainer
from lumina.emoji.trainer import draw_caption, naming_loss
from lumina.models.next_dit.config import PRESETS, NextDiTConfig
from lumina.training.run import learning_rate

TINY = NextDiTConfig(
    patch_size=4, in_channels=3, dim=48, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=16,
    learn_sigma=False, cap_feat_dim=32,
)  # fmt: skip
CONFIG = TrainConfig(steps=8, lr=1e-3, batch=4, naming_batch=6, warmup=2, autocast=False)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "compact", TINY)


def pictures(count=5):
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8)
    captions = {name: [f"{name} {i}" for i in range(count)] for name in ("en", "de", "ja")}
    return EmojiSet(images, [str(i) for i in range(count)], captions)


def assert_same_state(a: Trainer, b: Trainer):
    assert a.losses == b.losses
    pairs = [(a.params, b.params), (a.ema, b.ema)]
    moments = [[s["exp_avg_sq"] for s in t.optimizer.state.values()] for t in (a, b)]
    for left, right in [*pairs, moments]:
        assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def test_loss_of_a_step_is_that_of_its_pictures():
    trainer = Trainer(CONFIG, pictures())
    for p in trainer.params:
        torch.nn.init.normal_(p, std=0.1)
    x1, symbols, t, noise = trainer.batch(random.Random(f"{CONFIG.seed} 0"))
    features, mask = trainer.model["caption_encoder"](symbols)
    expected = 0.0
    for i in range(len(x1)):
        x = t[i] * x1[i] + (1 - t[i]) * noise[i]
        v = trainer.model["network"](x[None], t[i : i + 1], features[i : i + 1], mask[i : i + 1])[0]
        expected += (v - x1[i] + noise[i]).square().mean().item() / len(x1)
    assert trainer.step() == pytest.approx(expected, rel=1e-5)


def test_naming_loss_reads_each_caption_alone():
    trainer = Trainer(CONFIG, pictures())
    symbols, index = trainer.naming_batch(random.Random(0))
    loss = naming_loss(trainer.model, symbols, index)
    expected = 0.0
    for row, target in zip(symbols, index, strict=True):
        features, mask = trainer.model["caption_encoder"](row[None])
        mean = features[0][mask[0]].mean(0)
        logits = trainer.model["naming"](F.layer_norm(mean, mean.shape))
        expected -= logits.log_softmax(0)[target].item() / len(index)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("t_sampling", ["uniform", "lognorm"])
def test_batches(t_sampling):
    config = replace(CONFIG, batch=4000, t_sampling=t_sampling, t_mean=-0.5, caption_dropout=0.25)
    data = pictures()
    trainer = Trainer(config, data)
    x1, symbols, t, noise = trainer.batch(random.Random(3))
    assert (symbols[:, 1] == 257).float().mean() == pytest.approx(0.25, abs=0.03)  # empty
    u = t if t_sampling == "uniform" else torch.special.ndtr(torch.logit(t) + 0.5)
    assert all(abs(n - 400) < 90 for n in torch.histc(u, 10, 0, 1).tolist())
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    known = to_float(data.images).flatten(1)
    assert (x1.flatten(1)[:, None] == known).all(2).any(1).all()
    again = trainer.batch(random.Random(3))
    assert all(torch.equal(a, b) for a, b in zip((x1, symbols, t, noise), again, strict=True))


def test_captions_are_drawn_as_documented():
    data, rng = pictures(), random.Random(0)
    drawn = Counter(draw_caption(data.captions, 2, 0.4, rng) for _ in range(8000))
    english = sum(n for text, n in drawn.items() if text.endswith("en 2"))
    articles = sum(n for text, n in drawn.items() if text.endswith("en 2") and text != "en 2")
    assert english == pytest.approx(3200, abs=150)
    assert articles / english == pytest.approx(0.25, abs=0.03)
    assert drawn["ja 2"] == pytest.approx(2400, abs=150)  # no articles there
    data.captions["ja"][2] = ""
    assert draw_caption({"ja": [""] * 3, "en": ["a", "b", "c"]}, 2, 0, rng) in ("c",)


def test_one_step_is_adamw_and_the_average_follows():
    trainer = Trainer(replace(CONFIG, ema=0.9), pictures())
    before = [p.detach().clone() for p in trainer.params]
    trainer.step()
    moved = [(p - b).abs().max().item() for p, b in zip(trainer.params, before, strict=True)]
    assert max(moved) == pytest.approx(CONFIG.lr / CONFIG.warmup, rel=1e-3)  # Adam's first step
    for p, b, average in zip(trainer.params, before, trainer.ema, strict=True):
        torch.testing.assert_close(average, b + 0.9 * (p - b))  # decay (1 + 0) / (10 + 0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = Trainer(CONFIG, pictures())
    trainer.step()
    trainer.save(tmp_path / "state.pt")
    trainer.images[:] = torch.inf
    before = [p.detach().clone() for p in trainer.params]
    with pytest.raises(RuntimeError, match="loss of step 1 is"):
        trainer.step()
    assert all(torch.equal(p, b) for p, b in zip(trainer.params, before, strict=True))


def test_training_learns():
    config = replace(CONFIG, steps=50, batch=8, lr=3e-3, t_sampling="uniform")
    trainer = Trainer(config, pictures(2))
    for _ in range(config.steps):
        trainer.step()
    assert sum(trainer.losses[-10:]) < 0.7 * sum(trainer.losses[:10])


def test_resumed_equals_uninterrupted(tmp_path):
    data = pictures()
    whole = training.train(CONFIG, tmp_path / "whole", data=data, progress=False)
    part = Trainer(CONFIG, data)
    for _ in range(5):
        part.step()
    part.save(tmp_path / "state.pt")
    part.step()  # what a kill after the save loses
    resumed = training.train(CONFIG, tmp_path, data=data, progress=False)
    assert resumed.done == CONFIG.steps
    assert_same_state(whole, resumed)


KILLED = """
import sys, torch
from lumina.models.next_dit.config import PRESETS
sys.path.insert(0, sys.argv[2])
import test_train
PRESETS["compact"] = test_train.TINY
torch.manual_seed(0)
torch.use_deterministic_algorithms(True, warn_only=True)  # as the test, which compares bits
data = test_train.pictures()
from dataclasses import replace
config = replace(test_train.CONFIG, steps=300)
test_train.training.train(config, sys.argv[1], data=data, save_every=3, progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_resumes(tmp_path, number):
    command = [sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(__file__)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while not (tmp_path / "state.pt").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(60)
    torch.manual_seed(0)
    data = pictures()
    config = replace(CONFIG, steps=300)
    saved = Trainer(config, data)
    saved.load(tmp_path / "state.pt")
    assert 3 <= saved.done < 300
    if number == signal.SIGTERM:
        assert process.returncode == 0  # the step under way was finished, and saved
    whole = Trainer(config, data)
    while whole.done < saved.done + 2:
        whole.step()
    saved.step(), saved.step()
    assert_same_state(whole, saved)


def test_save_that_fails_leaves_the_old_state(tmp_path, monkeypatch):
    trainer = Trainer(CONFIG, pictures())
    trainer.save(tmp_path / "state.pt")
    old = (tmp_path / "state.pt").read_bytes()

    def broken(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == old
    assert os.listdir(tmp_path) == ["state.pt"]


def test_other_settings_do_not_continue_a_run(tmp_path):
    trainer = Trainer(CONFIG, pictures())
    trainer.save(tmp_path / "state.pt")
    for change, message in (
        ({"lr": 0.5}, "lr 0.001 -> 0.5"),
        ({"steps": 7}, "steps 8 -> 7"),
        ({"steps": 9, "batch": 5}, "batch 4 -> 5"),
    ):
        with pytest.raises(ValueError) as error:
            Trainer(replace(CONFIG, **change), pictures()).load(tmp_path / "state.pt")
        path = tmp_path / "state.pt"
        assert str(error.value) == f"{path} was started with other settings: {message}"


def test_a_finished_run_takes_more_steps(tmp_path):
    """The first steps are those of the shorter run, the others follow the new cosine."""
    data, rates = pictures(), []
    short = training.train(replace(CONFIG, steps=4), tmp_path, data=data, progress=False)
    long = training.train(CONFIG, tmp_path, data=data, progress=False)
    assert (short.done, long.done) == (4, 8) and long.losses[:4] == short.losses
    by_hand = Trainer(CONFIG, data)
    by_hand.load(tmp_path / "state.pt")
    assert by_hand.done == 8
    by_hand = Trainer(replace(CONFIG, steps=4), data)
    for _ in range(4):
        by_hand.step()
    by_hand.config = CONFIG
    for _ in range(4):
        by_hand.step()
        rates.append(by_hand.optimizer.param_groups[0]["lr"])
    wanted = dict(peak=CONFIG.lr, warmup=CONFIG.warmup, steps=8, decay="cosine")
    assert rates == [learning_rate(i, **wanted) for i in range(4, 8)]
    assert_same_state(by_hand, long)


def test_states_that_are_none(tmp_path):
    path = tmp_path / "state.pt"
    trainer = Trainer(CONFIG, pictures())
    trainer.step()
    trainer.save(path)
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    contents = [b"", b"text", whole[: len(whole) // 2], whole[:100]]
    for foreign in (
        3,
        {},
        state | {"losses": 3},
        state | {"losses": ["x"]},
        state | {"model": {}},
        state | {"ema": state["ema"][1:]},
        state | {"ema": [3] * len(state["ema"])},
        state | {"optimizer": {}},
        state | {"config": state["config"] | {"steps": "8"}},
    ):
        torch.save(foreign, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            training.train(CONFIG, tmp_path, data=pictures(), progress=False)
        assert str(error.value).startswith(f"{path} "), error.value
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["state.pt"]


def test_what_could_not_be_saved_is_refused_before_the_training(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a folder, it must be a file or a new name"):
        training.train(CONFIG, tmp_path, data=pictures(), progress=False)
    with pytest.raises(ValueError, match="save_every must be at least 1, got 0"):
        training.train(CONFIG, tmp_path / "new", data=pictures(), save_every=0)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_export_is_the_average(tmp_path):
    trainer = training.train(CONFIG, tmp_path, data=pictures(), progress=False)
    model = lumina.load(tmp_path / "model.safetensors")
    encoder = lumina.load_caption_encoder(tmp_path / "model.safetensors")
    loaded = [*model.parameters(), *encoder.parameters()]
    for value, average in zip(loaded, trainer.ema[: len(loaded)], strict=True):
        assert torch.equal(value, average.half().float())
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("preset", "huge", "preset must be one of"),
        ("decay", "linear", "decay must be one of"),
        ("steps", 0, "steps must be positive"),
        ("lr", float("nan"), "lr must be positive, got nan"),
        ("lr", float("inf"), "lr must be finite, got inf"),
        ("batch", 2**21, "batch must be at most 1048576, got 2097152"),
        ("warmup", -1, "warmup must not be negative, got -1"),
        ("seed", 2**64, "seed must fit in 64 bits, got 18446744073709551616"),
        ("caption_dropout", 1.5, r"caption_dropout must lie in \[0, 1\], got 1.5"),
    ],
)
def test_errors(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **{field: value})
