"""The learning rate of a run, its stop by a signal, its curve."""

import math
import os
import signal
import sys

import pytest

from lumina.training.run import learning_rate, plot_losses, stop_signals


def test_learning_rate():
    given = dict(peak=2.0, warmup=10, steps=110)
    rates = [learning_rate(i, **given, decay="cosine") for i in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[110] == 0
    assert learning_rate(100, **given, decay="constant") == 2.0


def test_the_first_signal_is_noted_the_second_acts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_curve(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    plot_losses([1.0 / (i + 1) for i in range(500)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_losses([1.0, 0.5], path)
    assert not path.exists()
