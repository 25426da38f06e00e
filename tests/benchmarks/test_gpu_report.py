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
    with rows.open("a") as file:
        file.write('{"op": "cut o')
    error = tmp_path / "error"  # after which a process cannot go on, and another one does
    error.touch()
    code, said = finish(start("ops", tmp_path, CUDA_ERROR=str(error)))
    assert (code, error.exists()) == (1, False), said
    after = read(rows)
    assert after[: len(killed)] == killed
    tasks = [row["task"] for row in after[len(killed) :] if "task" in row]
    assert [row["error"] for row in after if row.get("failed")] == [
        "RuntimeError: CUDA error: of the stub"
    ]
    assert sum("machine" in row for row in after) == 3
    assert {row["task"] for row in killed[1:]}.isdisjoint(tasks)
    measured_rows = [row for row in after if "seconds" in row]
    kernels = {row["kernel"] for row in measured_rows if row.get("kernel")}
    assert "gqa_attention_fwd" in kernels and any(name.endswith("_bwd") for name in kernels)
    assert {"eager", "flex", "lumina-triton", "lumina-cuda"} <= {
        z["variant"] for z in measured_rows
    }
    assert "1 rows failed" in said


def test_networks_write_rows_that_make_a_report(tmp_path, monkeypatch):
    code, said = finish(start("networks", tmp_path))
    assert code == 0, said
    rows, others = tmp_path / "networks.jsonl", tmp_path / "rows.jsonl"
    with rows.open("a") as file:
        file.write('{"test": "cut o')
    for line in ({"machine": {}, "arch": 90}, {"op": "swiglu", "seconds": 1.0}):
        append(others, line)  # of the command `ops`, in the same folder
    out = tmp_path / "report"
    given = ["report", "--rows", str(others), str(rows), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    assert report.main() == 0
    text = (out / "report.md").read_text()
    for title in ("block", "patched_block", "swiglu"):
        assert f"## {title}\n" in text
    assert "| lumina-next-L16-float16 | lumina-triton |" in text
    monkeypatch.setattr(sys, "argv", ["report", "--rows", str(others), "--out", str(out)])
    with pytest.raises(SystemExit, match="none of the rows"):
        report.main()


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


def test_a_row_takes_the_place_of_one_that_was_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    for start in ("", '{"a": 1}\n', '{"a": 1}\n{"b"', '{"b"'):
        path.write_text(start)
        append(path, {"c": 3})
        assert read(path) == [{"a": 1}] * start.count("1}") + [{"c": 3}]


def test_predictions_stand_beside_what_was_measured(tmp_path):
    """`swiglu` on an H200, whose time there is known, twice: the second one is not compiled."""
    tasks = list(sweep.all_tasks(None))
    first = next(i for i, task in enumerate(tasks) if task.op == "swiglu")
    small = next(
        i for i, z in enumerate(tasks) if z.op == "swiglu" and z.shape == LUMINA_NEXT.but(side=32)
    )
    rows = tmp_path / "rows.jsonl"
    append(rows, {"machine": {"gpu": "NVIDIA H200"}, "arch": 90})
    for task, seconds in ((first, 7.55e-5), (small, 1e-3)):
        append(rows, row(seconds=seconds, task=task))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.predicted", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    cells = [line.split(" | ") for line in done.stdout.splitlines() if "`swiglu`" in line]
    assert [line[1] for line in cells] == [
        "lumina-next-L1024-bfloat16",
        "lumina-next-L4096-bfloat16",
    ]
    ratios = [float(line[4]) for line in cells]
    assert ratios[0] < 0.1 and ratios[1] == pytest.approx(1, abs=0.15)
    assert float(cells[1][3]) == pytest.approx(75.5, rel=0.15)


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


def test_times_are_compared_on_each_gpu():
    """The second one ended early, or is slower: its own present time is what counts there."""
    fast, rows = {"BLOCK": 2048}, [configured({}, 0.70, gpu="A"), configured({}, 1.00, gpu="B")]
    slower = configured(fast, 0.72, gpu="A")
    assert choose.configurations([*rows, slower]) == {}
    faster = configured(fast, 0.5, gpu="A")
    ((chosen, gain),) = choose.configurations([*rows, faster]).values()
    assert (chosen, gain) == (fast, pytest.approx(1.4))
    both = [*rows, faster, configured(fast, 0.8, gpu="B")]
    ((_, gain),) = choose.configurations(both).values()
    assert gain == pytest.approx((1.4 / 0.8) ** 0.5)
    partly = configured({"BLOCK": 512}, 0.1, gpu="A")
    ((chosen, _),) = choose.configurations([*both, partly]).values()
    assert chosen == fast


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
    rule = backend.LARGE
    best = {None: float("inf"), "the rule": rule}.get(bound, bound)
    assert choose.triton_bounds(rows, {}) == ({} if best == rule else {"swiglu": best})
    # What the table has stays if it is as fast, and goes if the rule is.
    same = {None: 1 << 40, "the rule": (1 << 24) - 1}.get(bound, bound)
    assert choose.triton_bounds(rows, {"swiglu": same}) == {}
    wrong = {"swiglu": 1 if bound != 1 else None}
    assert choose.triton_bounds(rows, wrong) == {"swiglu": best}
    # A second GPU on which the other one is much faster.
    others = [
        z | {"gpu": "B", "steady": 100 * z["steady"] if z["variant"] == choose.TRITON else 1}
        for z in rows
    ]
    assert choose.triton_bounds([*rows, *others], {}) == {"swiglu": float("inf")}


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
    once = table.read_text()
    assert choose.main() == 0 and table.read_text() == once
    for op, bound in (("gelu", None), ("swiglu", 5)):
        now["triton_from"][op] = bound
    table.write_text(json.dumps({"sm_90": now}))
    for values in (1 << 20, 1 << 21):  # smaller than the rule's bound, so that CUDA is its choice
        for op in ("gelu", "swiglu"):
            append(rows, row("lumina-triton", 2.0, op=op, values=values))
            append(rows, row("lumina-cuda", 1.0, op=op, values=values))
    assert choose.main() == 0
    assert json.loads(table.read_text())["sm_90"]["triton_from"] == {"gelu": None}


def test_the_program_tries_every_kernel_that_reads_the_table():
    """By the names that the launchers ask for."""
    asked = set()
    for path in (ROOT / "lumina_kernels" / "triton").glob("*.py"):
        asked |= {
            text.split('"')[1] for text in path.read_text().split("tuned(")[1:] if '"' in text
        }
    tried = {task.kernel for task in sweep.all_tasks(None) if task.kernel}
    asked = {name for name in asked if name.replace("_", "").isalnum()}
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
