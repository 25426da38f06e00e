"""The script that writes tiny checkpoints."""

import pytest
import torch
from pipelines.runs import SMALL
from safetensors.torch import load_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_the_script(tiny, tmp_path):
    with pytest.raises(ValueError, match="family must be one of .*, got 'sd3'"):
        tiny.write("sd3", tmp_path)
    (tmp_path / "old").touch()
    with pytest.raises(ValueError, match="must be new or empty"):
        tiny.write("lumina2", tmp_path)
    a, b, c = (
        load_file(tiny.write("lumina_next", tmp_path / str(i), seed) / "vae" / WEIGHTS)
        for i, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["decoder.conv_in.weight"], c["decoder.conv_in.weight"])
    assert SMALL["height"] == 64
