"""The time that the model predicts: of code made by hand, and against what an H200 measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from common import run_compiling

from lumina_kernels import sass
from lumina_kernels.machine import A100, H200, MACHINES
from lumina_kernels.prediction import (
    Launch,
    hot_loop,
    loop_trips,
    predict,
    predicted,
    resident_blocks,
    waits_per_product,
)
from lumina_kernels.warp import Warp

# Of the kernels of attention's forward the model finds about 4 / 5 of the time, of others more.
MEASURED = {"swiglu": 0.15, "norm_modulate": 0.15, "sandwich_norm": 0.15, "gqa_attention": 0.3}
PREDICT = """
import json, sys
from importlib import import_module
import lumina_kernels
from benchmarks.harness.shapes import LUMINA_NEXT
from lumina_kernels import aot
from lumina_kernels.triton import sandwich_norm
sandwich_norm.loads_early = lambda *given: False  # as the kernel was when it was measured
found = {}
for op in sys.argv[2:]:
    inputs = import_module(f"benchmarks.ops.bench_{op}").case(LUMINA_NEXT, "cpu").inputs
    with aot.offline(90) as (compiled, launches):
        getattr(lumina_kernels, op)(**inputs, backend="triton")
    (row,) = aot.figures(compiled, launches, 90, 0.9 if op == "gqa_attention" else 1.0)
    found[op] = row
open(sys.argv[1], "w").write(json.dumps(found))
"""


def control(stall=1, sets=7, frees=7, waits=0):
    return f"/* 0x{(waits << 11 | frees << 8 | sets << 5 | stall) << 41:016x} */"


def function(*lines):
    """A kernel of lines (code, its control bits), and of labels."""
    text = [".text.k:"]
    for number, line in enumerate(lines):
        if isinstance(line, str):
            text.append(line)
        else:
            code, bits = line
            text += [f" /*{number:04x}*/ {code} ; /* 0x{0:016x} */", f" {control(**bits)}"]
    return sass.functions("\n".join(text))["k"]


def launch(code, **changes):
    given = {"grid": 132, "warps": 4, "registers": 32, "shared": 0, "bytes": 1 << 20}
    return Launch(code, **given | changes)


def alone(code, latency=1000.0):
    warp = Warp(H200, latency)
    return warp.run(code, code.body, lambda loop: 100), warp.most_in_flight


def load(number):
    return f"LDG.E.128 R{4 * number}, desc[UR4][R2.64]", {"sets": number}


def use(*numbers):
    return "FADD R1, R1, R2", {"waits": sum(1 << number for number in numbers)}


def test_blocks_that_a_processor_holds():
    """As NVIDIA's occupancy calculator has it."""
    code = function(("EXIT", {}))
    for registers, warps, shared, blocks in (
        (255, 4, 0, 2), (96, 9, 0, 2), (97, 9, 0, 1), (32, 8, 0, 8), (32, 1, 0, 32),
        (32, 4, 80 << 10, 2), (32, 4, 113 << 10, 2), (32, 4, 114 << 10, 1), (16, 4, 0, 16),
    ):  # fmt: skip
        found = resident_blocks(launch(code, registers=registers, warps=warps, shared=shared), H200)
        assert found == blocks, (registers, warps, shared)


def test_loads_before_the_first_use_are_under_way_together():
    together = function(load(0), load(1), use(0), use(1), ("EXIT", {}))
    one_by_one = function(load(0), use(0), load(1), use(1), ("EXIT", {}))
    time, in_flight = alone(together)
    assert 1000 < time < 1010 and in_flight == 32
    time, in_flight = alone(one_by_one)
    assert 2000 < time < 2010 and in_flight == 16


def test_a_loop_with_a_load_ahead_waits_for_half_as_long():
    """Copies of the next tile are waited for one iteration later (DEPBAR.LE SB0, 0x1)."""

    def loop(left):
        copy = ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", {}), ("LDGDEPBAR", {})
        wait = (f"DEPBAR.LE SB0, 0x{left}", {})
        return function(*copy, ".L1:", *copy, wait, ("@P0 BRA `(.L1)", {}), ("EXIT", {}))

    at_once, ahead = alone(loop(0))[0], alone(loop(1))[0]
    assert at_once == pytest.approx(100 * 1000, rel=0.02)
    assert ahead == pytest.approx(at_once / 2, rel=0.05)


def hopper(serialised):
    start, wait = ("WARPGROUP.ARRIVE", {}), ("WARPGROUP.DEPBAR.LE gsb0, 0x0", {})
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
    lines = []
    for number in range(4):
        ends = serialised or number == 3
        lines += [start] * (number == 0)
        lines += [(product + ", gsb0" * ends, {})] + [wait] * ends
    return function(".L1:", *lines, ("@P0 BRA `(.L1)", {}), ("EXIT", {}))


def test_products_that_wait_for_each_other():
    good, bad = hopper(serialised=False), hopper(serialised=True)
    assert waits_per_product(good) == 1 / 4 and waits_per_product(bad) == 1
    assert waits_per_product(function(("EXIT", {}))) is None
    cycles = 32 / H200.product_share  # of a product of 64 x 64 x 16
    assert alone(good)[0] > 400 * cycles
    assert alone(bad)[0] > alone(good)[0] + 300 * Warp.other
    flops = 132 * 4 * 2 * 64 * 64 * 16 * 100
    assert (predict(launch(bad, flops=flops), H200).seconds
            > 1.2 * predict(launch(good, flops=flops), H200).seconds)  # fmt: skip


def test_trips_follow_from_the_work():
    code = hopper(serialised=False)
    of_a_pass = 4 * 2 * 64 * 64 * 16  # by the four warps of a block
    given = launch(code, flops=132 * of_a_pass * 25)
    loop = hot_loop(code, tensor=True)
    assert loop_trips(given)(loop) == 25
    # A loop around it, with as many products before and after it, for another branch of the keys.
    product = ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", {})
    both = function(
        ".L1:", product, ".L2:", product, product, ("@P0 BRA `(.L2)", {}), product,
        ("@P1 BRA `(.L1)", {}), ("EXIT", {}),
    )  # fmt: skip
    inner = hot_loop(both, tensor=True)
    assert not inner.loops and len(both.straight(inner)) == 3
    assert loop_trips(launch(both, flops=132 * 20 * of_a_pass / 4))(inner) == 9
    rows = function(".L1:", load(0), use(0), ("STG.E.128 [R2], R4", {}), ("@P0 BRA `(.L1)", {}),
                    ("EXIT", {}))  # fmt: skip
    moved = launch(rows, bytes=132 * 4 * 32 * (16 + 16) * 7)
    assert loop_trips(moved)(hot_loop(rows, tensor=False)) == 7


def test_a_copy_takes_the_time_of_a_copy():
    """Many warps with loads under way, few instructions: nothing but memory limits it."""
    code = function(*map(load, range(4)), use(0, 1, 2, 3),
                    *[("STG.E.128 [R2], R4", {})] * 4, ("EXIT", {}))  # fmt: skip
    size = 1 << 28
    given = launch(code, grid=size // (128 * 128), bytes=size)
    for gpu in MACHINES.values():
        found = predict(given, gpu)
        assert found.limit == "copy", gpu.name
        copy = size / gpu.copy_rate + gpu.launch
        assert copy <= found.seconds < 1.1 * copy, gpu.name
    assert found.in_flight == 32 * 4 * 64 * found.resident
    # One load at a time, few warps: latency.
    slow = function(load(0), use(0), ("STG.E.128 [R2], R4", {}), ("EXIT", {}))
    rare = launch(slow, grid=size // (32 * 128), bytes=size, shared=100 << 10)
    assert predict(rare, H200).limit == "latency"
    assert predict(rare, H200).seconds > 1.7 * size / H200.copy_rate


def test_many_instructions_a_byte_limit_by_their_issue():
    code = function(load(0), use(0), *[("FFMA R1, R1, R2, R3", {})] * 400,
                    ("STG.E.128 [R2], R4", {}), ("EXIT", {}))  # fmt: skip
    given = launch(code, grid=1 << 16, bytes=(1 << 16) * 128 * 32)
    on_h200 = predict(given, H200)
    assert on_h200.limit == "issue" and on_h200.per_copy > 1.7
    slots = (1 << 16) * 4 * 404 / (4 * 132 * H200.ghz * 1e9)
    assert on_h200.seconds == pytest.approx(slots + H200.launch, rel=0.1)
    assert predict(given, A100).limit == "FMA"  # whose parts have 16 lanes
    assert predict(given, replace(H200, ghz=2 * H200.ghz)).seconds < 0.7 * on_h200.seconds


def test_a_grid_smaller_than_the_gpu_is_no_faster_than_one_block():
    code = function(load(0), use(0), *[("FFMA R1, R1, R2, R3", {})] * 400, ("EXIT", {}))
    one, all_of_it = (predict(launch(code, grid=grid), H200).seconds for grid in (1, 132))
    assert one == all_of_it
    assert predict(launch(code, grid=132 * 64), H200).seconds > 2 * one


def test_tensor_cores_of_unknown_sizes_are_not_predicted():
    code = function(("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10]", {}), ("EXIT", {}))
    assert predicted(launch(code), 100) == {"predicted": {}}
    assert set(predicted(launch(function(("EXIT", {}))), 90)["predicted"]) == {"H100", "H200"}


def test_measured_times_are_predicted(tmp_path):
    """The ratios over all kernels are in benchmarks/results/machine-code.md."""
    root = Path(__file__).parents[1]
    done = run_compiling("-c", PREDICT, str(tmp_path / "found.json"), *MEASURED, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    report = json.loads((root / "benchmarks/results/h200/report.json").read_text())
    measured = {
        row["extra_info"]["op"]: row["stats"]["median"] * 1e6
        for row in report["benchmarks"]
        if row["extra_info"]["variant"] == "lumina-triton"
    }
    for op, error in MEASURED.items():
        ratio = found[op]["predicted"]["H200"]["us"] / measured[op]
        assert 1 / (1 + error) <= ratio <= 1 + error, (op, ratio)
    assert found["swiglu"]["predicted"]["H200"]["limit"] == "copy"
    assert found["norm_modulate"]["in_flight"] > 32 << 10
    for op in ("norm_modulate", "swiglu"):  # of the rate of a copy that is launched as well
        for gpu, figures in found[op]["predicted"].items():
            share = figures["share"] + MACHINES[gpu].launch * 1e6 / figures["us"]
            assert share >= 0.9, (op, gpu, share)
