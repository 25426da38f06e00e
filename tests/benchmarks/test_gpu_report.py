"""benchmarks/gpu_report.sh from end to end with tests/gpu_stub in place of a GPU, and what it does
when it is killed."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import choose, report
from benchmarks.gpu import sweep
from benchmarks.harness.rows import append, read
from benchmarks.harness.shapes import LUMINA_NEXT
from lumina_kernels import backend, measured

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "tests" / "gpu_stub"
MOST_FILES = 8  # that come back from the machine


def start(command, out, **variables) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    environment |= {
        "PATH": f"{STUB}:{os.environ['PATH']}", "PYTHON": str(STUB / "python"),
        "REAL_PYTHON": sys.executable, "SMALL": "1", "BUDGET": "300", "LUMINA_COMMIT": "none",
    }  # fmt: skip
    return subprocess.Popen(
        [ROOT / "benchmarks" / "gpu_report.sh", command, out], env=environment | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process) -> tuple[int, str]:
    said = process.communicate(timeout=600)[0]
    return process.returncode, said


def end(process) -> None:
    """Kill it and all it started, in whatever process group: they share its session."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,sid="], capture_output=True, text=True).stdout
    for pid, session in (map(int, line.split()) for line in listed.splitlines()):
        if session == process.pid:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    process.communicate()


def logs_of(out, command) -> dict[str, str]:
    with tarfile.open(out / f"{command}-logs.tar.gz") as tar:
        files = [member for member in tar if member.isfile()]
        return {Path(f.name).name: tar.extractfile(f).read().decode() for f in files}


def test_build_proves_and_names_what_failed(tmp_path):
    """accuracy and tests run side by side; a failing one is in the exit code."""
    started = start("build", tmp_path, CHOSEN="cuda and accura", BROKEN="gpu.accuracy")
    code, said = finish(started)
    assert code == 1, said
    assert (tmp_path / "failed.txt").read_text() == "failed: accuracy (exit code 7)\n"
    assert "passed" in (tmp_path / "tests.txt").read_text()
    logs = logs_of(tmp_path, "build")
    assert logs["build.txt"] == "built for 9.0\n"
    assert "passed" in logs["sanitizer.txt"] and "passed" in logs["test_swiglu.txt"]
    assert len(list(tmp_path.iterdir())) <= MOST_FILES


def test_ops_killed_in_the_middle_leave_rows_and_go_on(tmp_path):
    rows = tmp_path / "rows.jsonl"
    started = start("ops", tmp_path)
    try:
        stop = time.monotonic() + 300
        while not (rows.exists() and len(read(rows)) > 3) and time.monotonic() < stop:
            time.sleep(0.05)
    finally:
        end(started)
    killed = read(rows)
    assert len(killed) > 3 and "machine" in killed[0]
    table = tmp_path / "measured.json"
    sys_argv = ["choose", str(rows), "--table", str(table)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys_argv)
        assert choose.main() == 0
    assert "sm_90" in json.loads(table.read_text())
    code, said = finish(start("ops", tmp_path))
    assert code == 0, said
    after = read(rows)
    assert after[: len(killed)] == killed
    tasks = [row["task"] for row in after[len(killed) :] if "task" in row]
    assert {row["task"] for row in killed[1:]}.isdisjoint(tasks)
    measured_rows = [row for row in after if "seconds" in row]
    assert {"gqa_attention_fwd", "gelu_bwd"} <= {row.get("kernel") for row in measured_rows}
    assert {"eager", "flex", "lumina-triton", "lumina-cuda"} <= {
        z["variant"] for z in measured_rows
    }
    assert "0 rows failed" in said


def test_networks_write_rows_that_make_a_report(tmp_path, monkeypatch):
    code, said = finish(start("networks", tmp_path))
    assert code == 0, said
    rows = tmp_path / "compile.jsonl"
    with rows.open("a") as file:
        file.write('{"test": "cut o')
    out = tmp_path / "report"
    monkeypatch.setattr(sys, "argv", ["report", "--rows", str(rows), "--out", str(out)])
    assert report.main() == 0
    assert "| compact-L16-float32 | lumina-triton |" in (out / "report.md").read_text()


@pytest.mark.parametrize("words", ([], ["build"], ["all", "there"]))
def test_wrong_words(words):
    script = ROOT / "benchmarks" / "gpu_report.sh"
    done = subprocess.run([script, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "usage: benchmarks/gpu_report.sh build|ops|networks DIR\n"


COMPILE = """
from benchmarks.gpu import sweep
from benchmarks.harness.shapes import COMPACT

shape, warps = COMPACT.but(dtype="bfloat16"), {"ROWS": 2, "num_warps": 2}
task = sweep.Task("norm_modulate", shape, (sweep.TRITON,), "norm_modulate_fwd", shape.D, warps)
sweep.compile_ahead(task, 90)
"""


def test_a_configuration_is_compiled_ahead_for_the_gpu(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)
    (path,) = tmp_path.glob("*/norm_modulate_fwd_kernel.json")
    found = json.loads(path.read_text())
    assert (found["num_warps"], found["target"]["arch"]) == (2, 90)


def row(variant="lumina-triton", seconds=1.0, **more):
    about = {"arch": 90, "op": "swiglu", "shape": "a", "backward": False, "variant": variant}
    return about | {"seconds": seconds, "steady": seconds, "values": 1 << 20, "bits": 16} | more


def configured(configuration, seconds, shape="a", **more):
    more = {"kernel": "swiglu_fwd", "size": 1, "configuration": configuration} | more
    return row(seconds=seconds, shape=shape, **more)


def test_the_fastest_configuration_of_all_shapes_is_chosen():
    fast, mixed, partly = {"BLOCK": 2048}, {"BLOCK": 512}, {"BLOCK": 256}
    rows = [configured({}, 1.0), configured({}, 2.0, "b"), configured(fast, 0.8)]
    rows += [configured(fast, 1.5, "b"), configured(mixed, 0.5), configured(mixed, 4.0, "b")]
    rows += [configured(partly, 0.1)]
    ((name, (chosen, gain)),) = choose.configurations(rows).items()
    assert (name, chosen) == ("swiglu_fwd, 1, 16 bits", fast)
    assert gain == pytest.approx((1 / 0.8 * 2 / 1.5) ** 0.5)
    assert choose.configurations([configured({}, 1.0), configured(fast, 0.99)]) == {}
    assert choose.configurations([configured(fast, 0.5)]) == {}  # nothing to compare it with


@pytest.mark.parametrize(
    ("triton", "cuda", "bound"),
    (
        ((5, 5, 5), (1, 1, 1), None),
        ((1, 1, 1), (5, 5, 5), 1),
        ((5, 1, 1), (1, 5, 5), 1 << 21),
        ((5, 5, 1), (1, 1, 5), "the rule"),  # LARGE lies between the last two
    ),
)
def test_the_size_from_which_triton_is_faster(triton, cuda, bound):
    sizes = (1 << 20, 1 << 22, 1 << 24)
    rows = [row("lumina-triton", t, values=n) for n, t in zip(sizes, triton, strict=True)]
    rows += [row("lumina-cuda", t, values=n) for n, t in zip(sizes, cuda, strict=True)]
    expected = {} if bound == "the rule" else {"swiglu": bound}
    assert choose.triton_bounds(rows) == expected


def test_the_table_is_written_as_it_is_read(tmp_path, monkeypatch, capsys):
    """And what the rows say nothing about stays as it was."""
    rows, table = tmp_path / "rows.jsonl", tmp_path / "measured.json"
    before = Path(measured.__file__).with_name("measured.json").read_text()
    table.write_text(before)
    monkeypatch.setattr(sys, "argv", ["choose", str(rows), "--table", str(table)])
    append(rows, {"machine": {"gpu": "a GPU", "triton": "3.6"}, "arch": 90})
    assert choose.main() == 0 and table.read_text() == before
    for line in (configured({}, 1.0), configured({"BLOCK": 2048}, 0.5)):
        append(rows, line)
    assert choose.main() == 0
    assert "swiglu_fwd, 1, 16 bits: {'BLOCK': 2048}, 2.00 times as fast" in capsys.readouterr().out
    now, was = (json.loads(text)["sm_90"] for text in (table.read_text(), before))
    assert now["configurations"] == was["configurations"] | {
        "swiglu_fwd, 1, 16 bits": {"BLOCK": 2048}
    }
    assert now["measured"].startswith(was["measured"]) and "a GPU, triton 3.6" in now["measured"]


def test_the_program_tries_every_kernel_that_reads_the_table():
    """By the names that the launchers ask for."""
    asked = set()
    for path in (ROOT / "lumina_kernels" / "triton").glob("*.py"):
        asked |= {
            text.split('"')[1] for text in path.read_text().split("tuned(")[1:] if '"' in text
        }
    tried = {task.kernel for task in sweep.all_tasks(None) if task.kernel}
    untried = {"rope_table", "qk_norm_rope_table_bwd", "context_drop_bwd"}
    asked = {name for name in asked if name.replace("_", "").isalnum()} - untried
    assert asked <= tried, asked - tried
    first = next(iter(sweep.all_tasks(None)))
    assert (first.op, first.shape) == ("gqa_attention", LUMINA_NEXT.but(quick=False))


def test_resolve_reads_the_sizes(monkeypatch):
    """Of an op on a GPU, and the rule where none was measured."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(measured.TABLE, "sm_90", {"triton_from": {"gelu": None, "swiglu": 7}})
    backend._triton_from.cache_clear()
    device = torch.device("cuda")
    try:
        found = [backend.triton_from(op, device) for op in ("gelu", "swiglu", "rope3d")]
        assert found == [float("inf"), 7, backend.LARGE]
        big = type("Big", (), {"device": device, "numel": lambda self: 1 << 40})()
        order = ("triton", "cuda")
        firsts = [backend._best_first(order, big, op)[0] for op in ("gelu", "swiglu")]
        assert firsts == ["cuda", "triton"]
        monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
        firsts = [backend._best_first(order, big, op)[0] for op in ("gelu", "swiglu")]
        assert firsts == ["cuda", "triton"]
    finally:
        backend._triton_from.cache_clear()
