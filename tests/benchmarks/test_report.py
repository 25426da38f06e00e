"""The report: its tables, plots and files from synthetic rows, and runs of pytest that fail."""

import csv
import json

import pytest
from PIL import Image

from benchmarks import report
from benchmarks.harness import tables

GPU = {"processor": "a CPU", "threads": 16, "gpu": "a GPU", "driver": "1.2", "torch": "2.13",
       "triton": "3.9", "commit": "abc1234", "liger-kernel": None}  # fmt: skip
MODEL = {"model": "big", "D": 2304, "B": 2, "layers": 1, "dtype": "bfloat16", "backward": False}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """pytest-benchmark measures nothing in a child of a worker of pytest-xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def row(op, variant, median, L=4096, **info):
    """A row as conftest writes it. Eager PyTorch takes a millisecond."""
    info = MODEL | {"op": op, "L": L, "shape": f"big-L{L}-bfloat16", "variant": variant} | info
    info |= {"x eager": 1e-3 / median, "x compile": None, "peak MiB": L / 64}
    stats = {"median": median, "iqr": median / 20, "min": median, "rounds": 3}
    name = f"test_{op}[{info['shape']}-{variant}]"
    return {
        "group": f"{op} {info['shape']}",
        "name": name,
        "fullname": f"benchmarks/ops/bench_{op}.py::{name}",
        "extra_info": info,
        "stats": stats | {"data": [median] * 3},
    }


def memory_row(op, variant, median, **info):
    size = 2 << 20
    figures = {"bytes": size, "GB/s": size / median / 1e9, "clone GB/s": 40, "flops": None}
    return row(op, variant, median, **figures | {"of clone": size / median / 4e10} | info)


def matmul_row(op, variant, median, flops=10**9, **info):
    figures = {"flops": flops, "TFLOP/s": flops / median / 1e12, "matmul TFLOP/s": 4}
    return row(op, variant, median, **figures | {"of matmul": flops / median / 4e12} | info)


def synthetic():
    """A report with rows for every section and every plot."""
    rows = [
        memory_row("norm_modulate", "lumina-triton", 2e-4),
        memory_row("norm_modulate", "lumina-cuda", 1e-4),
        memory_row("norm_modulate", "eager", 1e-3),
        memory_row("norm_modulate", "liger", 1.6e-4),
        memory_row("swiglu", "lumina-triton", 2e-4),
        memory_row("swiglu", "eager", 1e-3),
        memory_row("swiglu", "compile", 1.5e-4),
        matmul_row("gqa_attention", "lumina-triton", 5e-4, bytes=10**6),
        matmul_row("gqa_attention", "eager", 1e-3, bytes=10**6),
        row("gqa_attention", "tomesd", 4e-4),
    ]
    for L in (256, 1024, 4096):
        rows.append(matmul_row("forward", "lumina-triton", 1e-6 * L**1.5, L=L, layers=24))
        rows.append(matmul_row("forward", "eager", 1e-7 * L**2, L=L, layers=24))
    for nfe, error, seconds in ((4, 0.1, 0.01), (8, 0.03, 0.02), (16, 0.04, 0.04)):
        info = {"solver": "euler", "schedule": "uniform", "nfe": nfe, "error": error}
        variant = f"lumina-euler-uniform-{nfe}"
        rows.append(row("sample", variant, seconds, context_drop=nfe == 16, **info))
    absent = {"case": "swiglu big-L4096-bfloat16", "variant": "liger", "outcome": "skipped",
              "test": "bench_swiglu.py::test_swiglu[big-L4096-bfloat16-liger]",
              "reason": "No module named liger_kernel"}  # fmt: skip
    return {
        "machine_info": GPU,
        "commit_info": {"id": "abc1234"},
        "benchmarks": rows,
        "datetime": "2026-01-02T03:04:05+00:00",
        "version": "5",
        "device": "cuda",
        "command": "python -m benchmarks.report --out there",
        "not_measured": [absent],
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    report.write(synthetic(), out)
    return out


def section(out, title):
    return (out / "report.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_header(written):
    head = (written / "report.md").read_text().split("\n## ")[0]
    for text in (
        "a GPU",
        "driver 1.2",
        "torch 2.13",
        "commit abc1234",
        "2026-01-02",
        "--out there",
    ):
        assert text in head
    assert "liger-kernel" not in head
    assert f"{len(synthetic()['benchmarks'])} rows measured, 1 not measured" in head


def test_table_of_a_memory_bound_op(written):
    lines = section(written, "norm_modulate").strip().splitlines()
    assert lines[0] == (
        "| shape | variant | time (spread) | GB/s | of clone | peak MiB | x eager |"
    )
    assert lines[3] == "| big-L4096-bfloat16 | lumina-cuda | 100 us (5%) | 21 | 52% | 64 | 10.00 |"


def test_table_of_an_op_with_matrix_products(written):
    lines = section(written, "gqa_attention").strip().splitlines()
    assert lines[2] == (
        "| big-L4096-bfloat16 | lumina-triton | 500 us (5%) | 2 | 50% | 64 | 2.00 |"
    )
    assert "GB/s" not in lines[0]


def test_csv(written):
    lines = list(csv.DictReader((written / "report.csv").open()))
    assert len(lines) == len(synthetic()["benchmarks"])
    first = lines[0]
    assert first["gpu"] == "a GPU" and first["driver"] == "1.2" and first["commit"] == "abc1234"
    assert first["date"].startswith("2026-01-02") and first["variant"] == "lumina-triton"
    assert float(first["median, s"]) == 2e-4 and float(first["GB/s"]) == pytest.approx(10.48576)


def test_json_is_what_pytest_benchmark_reads(written):
    read = json.loads((written / "report.json").read_text())
    assert read == synthetic()


def test_faster_peers(written):
    lines = section(written, "Where a peer is faster").strip().splitlines()
    assert lines[0] == "In 2 of 6 cases:"
    assert [line.split(" | ")[1:] for line in lines[4:]] == [
        ["compile", "150 us (5%)", "200 us (5%), lumina-triton", "33% |"],
        ["tomesd (computes something else)", "400 us (5%)", "500 us (5%), lumina-triton", "25% |"],
    ]
    ours = [row for row in synthetic()["benchmarks"] if row["extra_info"]["op"] == "norm_modulate"]
    assert tables.faster_peers(ours) == ["Nowhere, in 1 case."]


def test_scaling(written):
    assert (
        "| big, 24 layers, bfloat16 | lumina-triton | 256, 1024, 4096 | 1.50 | 1.50 |"
        in section(written, "Forward time over the number of tokens")
    )
    points = [tables.Point(L, 3 * L**1.5, 1) for L in (256, 1024)]
    points.append(tables.Point(4096, points[1].seconds * 16, 1))
    assert tables.exponent(points[1:]) == pytest.approx(2)
    assert tables.exponent(points) == pytest.approx(1.75)


def test_sampling(written):
    lines = section(written, "Sampling: time against error").strip().splitlines()
    assert lines[-1] == "| big-L4096-bfloat16 | euler | uniform | 16 | yes | 40 ms (5%) | 0.04 |"


def test_not_measured(written):
    assert section(written, "Not measured").strip() == (
        "- No module named liger_kernel: liger of swiglu big-L4096-bfloat16"
    )


def test_plots(written):
    names = sorted(path.name for path in written.glob("*.png"))
    assert names == ["cost.png", "memory.png", "quality.png", "roofline.png", "speedup.png"]
    for name in names:
        with Image.open(written / name) as image:
            assert 900 <= image.width <= 1000
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10
        assert f"]({name})" in (written / "report.md").read_text()
    assert not list(written.glob("*.tmp"))


def test_a_plot_without_rows_is_left_out(tmp_path):
    less = synthetic()
    report.write(less, tmp_path)
    less["benchmarks"] = less["benchmarks"][:4]
    report.write(less, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["roofline.png", "speedup.png"]
    assert "cost.png" not in (tmp_path / "report.md").read_text()


FAKE = """
import os, signal, torch
from benchmarks.harness.case import Case
from benchmarks.harness.shapes import COMPACT, CPU

SHAPES = tuple(COMPACT.but(side=side, devices=CPU) for side in (2, 3, 4, 5, 6))
PEERS = ("absent",)

def absent():
    raise ImportError("it is not installed")

def case(shape, device):
    if shape.side == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if shape.side == 5:
        raise RuntimeError("CUDA error: an illegal memory access")
    function = lambda x: 2 * x
    return Case({"x": torch.ones(8)}, {"lumina-cpu": function}, function, bytes=64,
                peers={"absent": absent})

def test_fake(compare):
    compare(case)
"""


def fake_benchmark(tmp_path, monkeypatch, text=FAKE):
    """Arguments that make pytest measure a file with the given text."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # torch.compile does nothing
    path = tmp_path / "bench_fake.py"
    path.write_text(text)
    return [str(path), "-p", "benchmarks.conftest", "--device", "cpu", "--seconds", "0.01"]


def test_a_crash_leaves_the_other_rows(tmp_path, monkeypatch):
    found = report.run(fake_benchmark(tmp_path, monkeypatch), tmp_path / "out")
    measured = {(z["extra_info"]["L"], z["extra_info"]["variant"]) for z in found["benchmarks"]}
    variants = ("lumina-cpu", "eager", "compile")
    assert measured == {(L, variant) for L in (4, 16, 36) for variant in variants}
    reasons = {(z["case"], z["outcome"], z["reason"]) for z in found["not_measured"]}
    shape = "fake compact-L{}-float32"
    text = "RuntimeError: CUDA error: an illegal memory access"
    killed, poisoned = (shape.format(L) for L in (9, 25))
    absent = {(shape.format(L), "skipped", "it is not installed") for L in (4, 16, 36)}
    assert reasons - absent == {
        (killed, "failed", "the process died: SIGKILL"),
        (poisoned, "failed", text),
        (poisoned, "failed", f"after {text}"),
    }
    assert len(found["not_measured"]) == 3 + 2 * 4
    text = tables.not_measured(found["not_measured"])
    assert f"- **failed**: the process died: SIGKILL: 4 rows of {killed}" in text
    assert "- it is not installed: absent of 3 cases (fake)" in text


def test_the_budget(tmp_path, monkeypatch):
    found = report.run(fake_benchmark(tmp_path, monkeypatch), tmp_path / "out", budget=0)
    assert not found["benchmarks"] and len(found["not_measured"]) == 20
    assert {z["reason"] for z in found["not_measured"]} == {tables.OUT_OF_BUDGET}
    report.write(found, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_file_that_does_not_load(tmp_path, monkeypatch):
    found = report.run(
        fake_benchmark(tmp_path, monkeypatch, "import nothing_of_that_name"), tmp_path / "out"
    )
    assert [z["test"] for z in found["not_measured"]] == ["collection"]
    assert "nothing_of_that_name" in (tmp_path / "out" / "logs" / "pytest.txt").read_text()


def test_wrong_arguments(tmp_path):
    with pytest.raises(SystemExit, match="measured nothing"):
        report.run(["--no-such-option"], tmp_path)


def test_cases_of_tests():
    prefix = "benchmarks/ops/bench_swiglu.py::test_swiglu[quarter-L4-float32-"
    variants = ("lumina-cpu", "eager", "backward-lumina-cpu", "backward-eager")
    found = report.split([f"{prefix}{variant}]" for variant in variants])
    cases = [(report.case_name(case), variant) for case, variant in found.values()]
    assert cases == [
        ("swiglu quarter-L4-float32", "lumina-cpu"),
        ("swiglu quarter-L4-float32", "eager"),
        ("swiglu quarter-L4-float32-backward", "lumina-cpu"),
        ("swiglu quarter-L4-float32-backward", "eager"),
    ]


def test_a_figure_of_zero_is_shown():
    rows = [
        row("swiglu", "lumina-cpu", 1e-3, **{"of clone": 0.0, "flops": None, "GB/s": 0.0}),
        row("swiglu", "eager", 1e-3, **{"of clone": None, "flops": 0, "GB/s": 2.0}),
    ]
    lines = tables.table(rows, tables.COLUMNS)
    assert lines[0] == "| shape | variant | time (spread) | GB/s | of clone | peak MiB | x eager |"
    assert lines[2].split(" | ")[3:5] == ["0", "0%"]
    assert lines[3].split(" | ")[3:5] == ["", ""]  # flops were counted
    sample = row("sample", "lumina-a", 1e-3, nfe=0, solver="a", schedule="uniform", error=0.0)
    assert tables.table([sample], tables.SAMPLE_COLUMNS)[2].split(" | ")[-1] == "0 |"


def test_the_last_line_counts_what_is_missing():
    entries = [{"outcome": "failed", "reason": "the process died: SIGKILL"}]
    entries += [{"outcome": "skipped", "reason": tables.OUT_OF_BUDGET}] * 3
    entries += [{"outcome": "skipped", "reason": "No module named liger_kernel"}]
    rows = synthetic()["benchmarks"]
    said = report.summary({"benchmarks": rows, "not_measured": entries})
    assert said == (
        f"{len(rows)} of {len(rows) + 5} rows measured, 1 failed, 4 skipped "
        "(3 of them for want of time, see --budget)"
    )


def test_a_budget_of_zero_is_a_budget(tmp_path, monkeypatch):
    """It is not replaced by the default, nor are zero seconds a case."""
    called = []
    monkeypatch.setattr(report, "run", lambda *arguments: called.append(arguments) or synthetic())
    options = ["--device", "cpu", "--budget", "0", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["report", *options])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    assert report.main() == 0
    ((arguments, _, budget),) = called
    assert budget == 0 and arguments[arguments.index("--seconds") + 1] == "0.0"
