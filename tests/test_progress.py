"""Progress without a terminal: plain lines, now and then."""

import io
import sys

import pytest
from tqdm import tqdm

from lumina import progress as module
from lumina.progress import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines(clock, capsys):
    with progress(100, "steps", done=40) as bar:
        for second in range(1, 31):
            clock[0] = float(second)
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update(2)
    said = capsys.readouterr()
    assert said.err == (
        "steps: 60 of 100, loss 0.5, about 20 s left\n"
        "steps: 80 of 100, loss 0.5, about 10 s left\n"
        "steps: 100 of 100, loss 0.5, about 0 s left\n"
    )
    assert said.out == ""


def test_an_unknown_total(clock, capsys):
    with progress(None, "steps") as bar:
        clock[0] = 11.0
        bar.update()
    assert capsys.readouterr().err == "steps: 1\n"


def test_short_work_and_hidden_work_say_nothing(clock, capsys):
    with progress(3, "steps") as bar, progress(3, "steps", shown=False) as hidden:
        clock[0] = 9.0
        bar.update()
        clock[0] = 99.0
        hidden.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(3, "steps") as bar:
        assert isinstance(bar, tqdm) and (bar.total, bar.desc) == (3, "steps")
