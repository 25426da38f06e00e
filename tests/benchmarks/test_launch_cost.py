"""`python -m benchmarks.launch_cost`, with Triton's interpreter in place of the compiler."""

import os
from contextlib import nullcontext

import pytest

from benchmarks import launch_cost
from lumina_kernels import aot, backend
from lumina_kernels.examples import Sizes
from lumina_kernels.ops import OPS


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="without a GPU")
def test_every_op_has_its_times(monkeypatch, capsys):
    monkeypatch.setattr(launch_cost, "SIZES", Sizes())
    monkeypatch.setattr(aot, "offline", lambda arch: nullcontext())
    monkeypatch.setitem(backend.DEVICES, "triton", "cpu")
    monkeypatch.setattr("sys.argv", ["launch_cost", "--repeats", "1"])
    launch_cost.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == list(OPS)
    for op, plain, recorded in rows:
        assert float(plain) > 0
        if op == "guided_step":  # the op without a gradient
            assert recorded == "-"
        else:
            assert float(recorded) > 0


def test_the_call_with_autograd_records_it():
    recorded = launch_cost.recorded(launch_cost.call_of("swiglu"))
    assert recorded.keywords["a"].requires_grad and not recorded.keywords["b"].requires_grad
    assert recorded.keywords["a"].shape == (2, 256, 6144)
