"""Damaged files of every format: an error in one line or the whole network; no crash, no hang, and
no more memory than twice the file. `LUMINA_FUZZ=500` damages as many files."""

import json
import os
import subprocess
import sys
from pathlib import Path

COUNT = int(os.environ.get("LUMINA_FUZZ", "40"))


def test_damaged_files():
    script = Path(__file__).with_name("fuzz.py")
    root = str(script.parents[2])
    run = subprocess.run(
        [sys.executable, script, str(COUNT)], capture_output=True, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": root}, timeout=60 + 2 * COUNT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    assert results["loaded"] + results["ValueError"] + results["FileNotFoundError"] == COUNT
    assert min(results["loaded"], results["ValueError"]) >= COUNT // 10
