"""The examples' models are rewritten as the examples say, and compute what they did."""

import sys
from pathlib import Path

import torch

from lumina_kernels import patch

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import compile_own_model  # noqa: E402
import patch_pipeline  # noqa: E402


def ops(report):
    return {row["op"] for row in report.rows()}


@torch.no_grad()
def test_a_random_transformer_of_diffusers():
    model, run = patch_pipeline.random_transformer()
    eager, report = run(), patch(model)
    patched = run()
    assert ops(report) >= {"qk_norm_rope_table", "gqa_attention", "sandwich_norm_chain", "swiglu"}
    assert (patched - eager).float().norm() <= 1e-2 * eager.float().norm()


@torch.no_grad()
def test_a_model_of_ones_own():
    model, inputs = compile_own_model.DiT(), (torch.randn(2, 256, 16), torch.rand(2))
    eager, report = model(*inputs), patch(model)
    patched = model(*inputs)
    assert ops(report) >= {"norm_modulate", "qk_norm_rope_table", "gqa_attention", "swiglu"}
    torch.testing.assert_close(patched, eager, atol=1e-5, rtol=1e-5)
