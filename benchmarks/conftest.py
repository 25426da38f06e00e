"""pytest's part of the benchmarks: one test for each variant of a case.

    pytest benchmarks --benchmark-only -k quick
    pytest benchmarks/ops/bench_swiglu.py --benchmark-json=swiglu.json --device cpu

A `bench_<name>.py` has SHAPES, PEERS (variants besides ours, eager and torch.compile) and a
function that makes the `Case` of a shape. pytest-benchmark times one function at a time, whereas
the variants of a case have to run in interleaved rounds. So the first test of a case measures all
of them (`benchmarks/harness/measure.py`), and pytest-benchmark reads the times from a clock that
replays them.
"""

import time
from dataclasses import asdict

import pytest
import torch

from benchmarks.harness.case import Unavailable, variant_names
from benchmarks.harness.machine import describe
from benchmarks.harness.measure import columns, measure
from benchmarks.harness.memory import keep_freed_memory
from benchmarks.harness.rows import append
from benchmarks.harness.timing import MIN_BATCHES


def pytest_addoption(parser):
    group = parser.getgroup("lumina benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--seconds", type=float, default=2.0, help="of a case's rounds (default: 2)")
    group.addoption("--batches", type=int, default=MIN_BATCHES, help="of rounds, at least")
    group.addoption("--no-compile", action="store_true", help="leave out torch.compile, it is slow")
    group.addoption("--budget", type=float, help="seconds after which the rest is skipped")
    group.addoption("--default-allocator", action="store_true", help="which may not keep memory")
    group.addoption("--rows", help="append the outcome of every test to this file, as JSON lines")


def pytest_configure(config):
    config.started = time.monotonic()
    if not config.getoption("--default-allocator"):
        keep_freed_memory()
    if config.getoption("--device") is None:
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    """A test for each shape of this device and each variant, grouped by shape."""
    if "compare" not in metafunc.fixturenames:
        return
    option, module = metafunc.config.option, metafunc.module
    metafunc.parametrize(
        ("shape", "variant"),
        [
            pytest.param(shape, variant, id=f"{shape}-{variant}", marks=marks(shape))
            for shape in module.SHAPES
            if option.device in shape.devices
            for variant in variants_of(module, shape, option)
        ],
    )


def pytest_collection_modifyitems(items):
    """The first shape of every file, then the second ones: when the budget runs out, every op has
    been measured."""
    order = {}
    for item in items:
        shapes = order.setdefault(item.path, [])
        if hasattr(item, "callspec") and item.callspec.params["shape"] not in shapes:
            shapes.append(item.callspec.params["shape"])
    items.sort(
        key=lambda item: (
            order[item.path].index(item.callspec.params["shape"])
            if hasattr(item, "callspec")
            else 0
        )
    )


def variants_of(module, shape, option) -> tuple[str, ...]:
    """The file's own `variants`, if it compares something other than implementations, or the usual
    ones."""
    if hasattr(module, "variants"):
        return module.variants(shape)
    names = variant_names(option.device, module.PEERS, shape.quick)
    is_slow = shape.quick and getattr(module, "SLOW_TO_COMPILE", False)
    skip = option.no_compile or is_slow
    return tuple(name for name in names if not (skip and "compile" in name))


def marks(shape) -> list:
    return [pytest.mark.benchmark(timer=clock), *[pytest.mark.quick] * shape.quick]


class Clock:
    """A clock that only `advance` moves."""

    __name__ = "interleaved"

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


clock = Clock()
measured = {}  # only the last case: (file, shape) -> the case and its rows by variant


@pytest.fixture
def compare(request, benchmark, shape, variant):
    """A function that takes the file's `case` and hands this variant's row to pytest-benchmark."""
    option, key = request.config.option, (request.path, shape)
    names = variants_of(request.module, shape, option)

    def check(make_case):
        if key not in measured:
            budget = option.budget
            if budget is not None and time.monotonic() - request.config.started > budget:
                pytest.skip(f"the {budget:.0f} seconds of --budget had passed")
            measured.clear()
            torch.manual_seed(0)
            try:
                case = make_case(shape, option.device)
                rows = measure(
                    case, option.device, option.seconds, shape.quick,
                    names=names, batches=option.batches,
                )  # fmt: skip
                measured[key] = case, rows
            except Exception as error:  # every variant of the case fails with it
                measured[key] = None, dict.fromkeys(names, error)
        case, rows = measured[key]
        row = rows[variant]
        if isinstance(row, (Unavailable, ImportError)):
            pytest.skip(str(row))
        if isinstance(row, Exception):
            raise row
        op = request.path.stem.removeprefix("bench_")
        benchmark.group = f"{op} {shape}"
        benchmark.extra_info |= {"op": op, "shape": str(shape), **asdict(shape), "L": shape.L}
        benchmark.extra_info |= columns(case, variant, rows)
        times = iter(row.seconds)
        benchmark.pedantic(lambda: clock.advance(next(times)), rounds=len(row.seconds))

    return check


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= about(config)


def pytest_collection_finish(session):
    """--rows: the tests that are about to run, and the machine."""
    config, ids = session.config, [item.nodeid for item in session.items]
    _append(config, {"machine": about(config), "device": config.option.device, "tests": ids})


def about(config) -> dict:
    """The machine, and what its allocator does."""
    allocator = "default" if config.option.default_allocator else "keeps freed memory"
    return describe(config.option.device) | {"allocator": allocator}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """--rows: the outcome of a test, with its row if it has one."""
    report = (yield).get_result()
    if report.when == "setup" and report.passed or report.when == "teardown" and not report.failed:
        return
    line = {"test": item.nodeid, "outcome": report.outcome}
    stats = getattr(item.funcargs.get("benchmark"), "stats", None)
    if report.outcome == "skipped":
        line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.outcome == "failed":
        line["reason"] = call.excinfo.exconly().splitlines()[0]
    elif stats is not None:
        line["row"] = stats.as_dict(include_data=False)
    _append(item.config, line)


def _append(config, line) -> None:
    if config.option.rows:
        append(config.option.rows, line)
