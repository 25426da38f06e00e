"""The benchmark of the pipelines, on a small network."""

import json
import sys

import torch

from benchmarks import pipelines


def test_writes_what_it_measured(tmp_path, monkeypatch):
    family, pipeline, network, sizes = pipelines.FAMILIES["Lumina-Image 2.0"]
    small = sizes | dict(hidden_size=192, num_layers=1, num_attention_heads=2, num_kv_heads=1)
    monkeypatch.setitem(pipelines.FAMILIES, "Lumina-Image 2.0", (family, pipeline, network, small))
    monkeypatch.setattr(pipelines, "ENCODER", dict(num_hidden_layers=1))
    arguments = ["--families", "Lumina-Image 2.0", "--tokens", "16", "--steps", "2"]
    arguments += ["--repeats", "1", "--threads", str(torch.get_num_threads())]
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # main sets it for its processes
    monkeypatch.setattr(sys, "argv", ["", *arguments, "--out", str(tmp_path)])
    assert pipelines.main() == 0
    (row,) = json.loads((tmp_path / "pipelines.json").read_text())["rows"]
    assert row.pop("family") == "Lumina-Image 2.0" and row.pop("tokens") == 16
    assert row.pop("difference (rms)") < 0.03  # both in bfloat16
    assert len(row) == 8 and all(value > 0 for value in row.values())
    table = (tmp_path / "pipelines.md").read_text().splitlines()
    assert [len(line.split("|")) for line in table] == [13, 13, 13]
    cells = table[2].split("|")
    speed = row["diffusers, s a step"] / row["ours, s a step"]
    assert cells[5].strip() == f"{speed:.2f}"
    assert cells[10].strip() == f"{row['ours, peak MiB']:.0f}"
