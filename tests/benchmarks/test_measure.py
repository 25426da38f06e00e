"""How a case is measured: the order of the calls, what is measured, and what is reported."""

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.harness import timing
from benchmarks.harness.case import Case, Unavailable, difference
from benchmarks.harness.measure import Row, columns, measure
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.timing import (
    CLONE,
    COLD,
    MATMUL,
    MAX_BATCHES,
    MAX_COPIES,
    MAX_GAP,
    MAX_ROUNDS,
    MIN_BATCHES,
    matmul_size,
    number_of_copies,
)

MIB = 2**20


def double(x):
    return 2 * x


def case(**arguments) -> Case:
    """A case whose functions take one x."""
    return Case(**({"inputs": {"x": torch.randn(64)}, "compiled": False} | arguments))


def test_rounds_are_interleaved_and_every_batch_has_inputs_at_new_addresses():
    calls = []

    def recorded(name):
        def function(x):
            calls.append((name, x.data_ptr()))
            return 2 * x

        return function

    names = ["eager", "ours", "peer"]
    ours, peers = {"ours": recorded("ours")}, {"peer": lambda: recorded("peer")}
    rows = measure(case(ours=ours, eager=recorded("eager"), peers=peers), "cpu", 0.0)
    assert list(rows) == names
    for row in rows.values():
        assert [len(batch) for batch in row.batches] == [1] * MIN_BATCHES
    # Each variant is called for its result and for its memory. Then the first batch has three
    # rounds, two of them to warm up, and the other batches have two. In a round a short call is
    # made twice, on other inputs: once for its code to be cached, and once to be timed.
    rounds = calls[2 * len(names) :]
    twice = [name for name in names for _ in range(2)]
    assert [name for name, _ in rounds] == twice * (3 + 2 * (MIN_BATCHES - 1))
    addresses = [address for _, address in rounds]
    first, second, third = (set(addresses[i : i + 6]) for i in (12, 24, 36))
    assert len(first) == len(second) == len(third) == 6
    assert not first & second and not second & third


def test_only_short_calls_are_made_twice(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 0.6 * timing.SHORT)
    functions = {"short": [lambda: calls.append("short")], "long": [lambda: next(clock)]}
    times = timing.cpu_rounds(functions, 3)
    assert calls == 6 * ["short"] and times["short"] == pytest.approx(3 * [0.6 * timing.SHORT])
    assert times["long"] == pytest.approx(3 * [1.2 * timing.SHORT])


def test_copies_of_the_inputs_do_not_fit_into_a_cache():
    x = torch.empty(COLD // 10 + 1, dtype=torch.uint8)
    assert number_of_copies(case(ours={}, eager=double, inputs={"x": x, "n": 3}), "cpu") == 10
    assert number_of_copies(case(ours={}, eager=double, inputs={"x": x[:1]}), "cpu") == MAX_COPIES


def test_a_variant_that_fails_leaves_the_others():
    def broken(x):
        raise RuntimeError("broken")

    def unavailable():
        raise Unavailable("only on the moon")

    def not_installed():
        import a_package_that_nobody_has  # noqa: F401

    peers = {
        "wrong": lambda: lambda x: 2.01 * x,
        "short": lambda: lambda x: (),
        "unavailable": unavailable,
        "not installed": not_installed,
    }
    ours = {"ours": broken, "right": double}
    rows = measure(case(ours=ours, eager=double, peers=peers), "cpu", 0.0)
    assert {name for name, row in rows.items() if isinstance(row, Row)} == {"right", "eager"}
    assert rows["right"].difference == 0
    assert isinstance(rows["ours"], RuntimeError)
    assert isinstance(rows["wrong"], AssertionError) and isinstance(rows["short"], AssertionError)
    assert isinstance(rows["unavailable"], Unavailable)
    assert str(rows["unavailable"]) == "only on the moon"
    assert isinstance(rows["not installed"], ImportError)


def test_a_wrong_gradient_is_caught():
    ours = {"right": double, "wrong": lambda x: x + x.detach()}
    rows = measure(case(ours=ours, eager=double, backward=True), "cpu", 0.0)
    assert isinstance(rows["right"], Row)
    assert isinstance(rows["wrong"], AssertionError)


def test_a_variant_that_is_not_equivalent_is_not_compared():
    peers = {"sum": lambda: lambda x: x.sum()}
    measured = case(ours={}, eager=double, peers=peers, not_equivalent=("sum",))
    rows = measure(measured, "cpu", 0.0)
    assert rows["sum"].difference is None
    assert columns(measured, "sum", rows)["difference"] is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept():
    """Once glibc's seven bins of small remainders are full, allocations of one size need no new
    pages until the freed memory is released."""
    program = """
import resource, torch
from benchmarks.harness.memory import keep_freed_memory, release_freed_memory
keep_freed_memory()
for i in range(20):
    if i == 19:
        release_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(benchmarks.__file__).parents[1], check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    faults = list(map(int, output.split()))
    assert faults[0] > 10 > max(faults[-6:-1]) and faults[-1] > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_difference_is_relative(dtype):
    x = torch.randn(10000).to(dtype)
    allowed = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    near, far = (x.double() * (1 + factor * allowed) for factor in (0.9, 1.1))
    assert difference("near", (near,), (x,)) == pytest.approx(0.9 * allowed, rel=0.01)
    with pytest.raises(AssertionError, match="far differs from eager"):
        difference("far", (far,), (x,))


@pytest.mark.parametrize(
    ("function", "held"),
    [
        (lambda x: x.clone(), 1),
        (lambda x: x.clone().ndim and x.clone(), 1),  # the first is freed before the second
        (lambda x: torch.add(x.clone(), x.clone()), 3),
        (lambda x: x.view(-1), 0),
    ],
)
def test_peak_bytes(function, held):
    x = torch.randn(MIB // 4)
    assert peak_bytes(lambda: function(x), "cpu") == held * MIB


def test_a_time_that_is_known():
    def wait(x):
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            pass
        return 2 * x

    rows = measure(case(ours={"ours": wait}, eager=double), "cpu", 0.3)
    assert rows["ours"].median == pytest.approx(0.02, rel=0.2)
    # 0.3 seconds are about 15 rounds. There could be as many batches, so each has one round.
    assert 5 <= len(rows["ours"].batches) <= 15 and len(rows["ours"].seconds) <= 15
    assert columns(case(ours={}, eager=double), "ours", rows)["x eager"] < 0.5


def test_a_fast_case_gets_many_batches_with_a_gap_of_random_size_before_each(monkeypatch):
    gaps = []

    def randrange(stop):
        gaps.append(stop)
        return stop - 1

    monkeypatch.setattr("random.randrange", randrange)
    row = measure(case(ours={"ours": double}, eager=double), "cpu", 1.0)["ours"]
    assert [len(batch) for batch in row.batches] == [MAX_ROUNDS["cpu"]] * MAX_BATCHES["cpu"]
    assert gaps == [MAX_GAP] * MAX_BATCHES["cpu"]


def test_columns():
    ceilings = {CLONE: [0.1, 0.5, 0.9], MATMUL: [0.25]}
    ours = Row([[1.0, 2.0], [2.0, 3.0], [2.0]], 3 * MIB, 1e-3, ceilings)
    rows = {
        "ours": ours,
        "eager": Row([[6.0], [6.0], [9.0]], MIB, None, ceilings),
        "compile": RuntimeError("it did not compile"),
    }
    measured = case(ours={}, eager=double, bytes=4 * 10**9, flops=10**12, info={"nfe": 8})
    figures = columns(measured, "ours", rows)
    rate = 2 * matmul_size("cpu") ** 3 / 0.25
    assert figures == {
        "variant": "ours",
        "bytes": 4 * 10**9,
        "flops": 10**12,
        "GB/s": 2.0,
        "clone GB/s": 8.0,
        "of clone": 0.25,
        "TFLOP/s": 0.5,
        "matmul TFLOP/s": rate / 1e12,
        "of matmul": 0.5e12 / rate,
        "peak MiB": 3.0,
        "difference": 1e-3,
        "batch medians": [1.5, 2.5, 2.0],
        "ceilings' batch medians": ceilings,
        "x eager": 3.0,
        "x compile": None,
        "nfe": 8,
    }
    # It computes something else: the bytes and FLOPs of the case are not its own.
    measured.not_equivalent = ("ours",)
    figures = columns(measured, "ours", rows)
    assert figures["GB/s"] is figures["TFLOP/s"] is figures["of clone"] is None
    assert figures["x eager"] == 3.0


def test_zero_is_a_figure_and_none_is_not():
    """A difference of 0 (the same bits), no allocation and a false setting are results; a figure
    that was not measured is None."""
    peers = {"same": lambda: double, "view": lambda: lambda x: x.view(-1)}
    measured = case(ours={}, eager=double, peers=peers, not_equivalent=("view",))
    measured.variant_info = {"same": {"context_drop": False, "error": 0.0}}
    rows = measure(measured, "cpu", 0.0)
    same, view = (columns(measured, name, rows) for name in ("same", "view"))
    assert same["difference"] == 0.0 and same["context_drop"] is False and same["error"] == 0.0
    assert view["peak MiB"] == 0.0
    uncounted = ("bytes", "GB/s", "clone GB/s", "of clone", "flops", "TFLOP/s", "of matmul")
    assert {same[name] for name in uncounted} == {None}
    assert view["difference"] is None and same["x compile"] is None
