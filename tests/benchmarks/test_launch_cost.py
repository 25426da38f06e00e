"""`python -m benchmarks.launch_cost`, with Triton's interpreter in place of the compiler, and what
a call does on the host, in numbers that do not depend on the machine."""

import os
import sys
from contextlib import nullcontext

import pytest
import torch
from common import NATIVE

from benchmarks import launch_cost
from lumina_kernels import aot, backend
from lumina_kernels.examples import Sizes
from lumina_kernels.ops import OPS


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="without a GPU")
def test_every_op_has_its_times(monkeypatch, capsys):
    monkeypatch.setitem(launch_cost.SIZES, "triton", Sizes())
    monkeypatch.setattr(aot, "offline", lambda arch: nullcontext(([], [])))
    monkeypatch.setattr(launch_cost, "keep_freed_memory", lambda: None)
    monkeypatch.setitem(backend.DEVICES, "triton", "cpu")
    monkeypatch.setattr("sys.argv", ["launch_cost", "--repeats", "1"])
    launch_cost.main()
    floor, *rows = [line.rsplit(None, 2) for line in capsys.readouterr().out.splitlines()[1:]]
    assert floor[0] == "(does nothing)" and float(floor[1]) > 0
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


def functions_called(call) -> int:
    """How many functions Python calls, its own and those of C."""
    called = []
    call()  # imports, caches
    sys.setprofile(lambda frame, event, arg: called.append(event))
    try:
        call()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in called) - 1


@pytest.mark.skipif("cpu" not in NATIVE, reason="needs the C++ kernels")
@pytest.mark.parametrize("op", OPS)
def test_a_call_stays_cheap_for_the_host(op):
    """Each function takes 0.1 to 1 us. A dispatch more is five of them, and 25 with autograd. Three
    of a tensor's nine ask whether it is a plain one."""
    call = launch_cost.call_of(op, "cpu")
    most = 24 + 9 * sum(isinstance(x, torch.Tensor) for x in call.keywords.values())
    with torch.no_grad():
        assert functions_called(call) <= most
    if op != "guided_step":
        assert functions_called(launch_cost.recorded(call)) <= most + 15
