"""Networks that torchao's `quantize_` has quantised, inside of pipelines."""

import copy

import pytest
import torch
from pipelines.runs import FAMILIES, PROMPTS, draw
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

# How far the latents may be off. A linear of zeros takes them as far as 0.1 to 1.6 (two of the text
# branch alone 0.05), and what else goes wrong differs from the rounded weights in plain linears.
RULES = {"int8": (Int8WeightOnlyConfig, 0.05), "float8": (Float8WeightOnlyConfig, 0.12)}


def away(a, b):
    """RMS of a - b over that of b."""
    a, b = a.double(), b.double()
    assert torch.isfinite(a).all()
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


def with_network(pipe, network):
    parts = {name: getattr(pipe, name) for name in pipe.components}
    made = type(pipe)(**{**parts, "transformer": network})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_weights(family, dtype, rule, ours):
    config, bound = RULES[rule]
    network = copy.deepcopy(ours[family].transformer).to(dtype)
    plain = draw(with_network(ours[family], network), PROMPTS)
    quantised = copy.deepcopy(network)
    quantize_(quantised, config())
    got = draw(with_network(ours[family], quantised), PROMPTS)
    assert 0.002 < away(got, plain) < bound
    for name, linear in quantised.named_modules():
        if isinstance(linear, nn.Linear):
            assert hasattr(linear.weight, "qdata"), name  # all of them, also those in fused ops
            weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)
            network.get_submodule(name).weight = weight
    rounded = draw(with_network(ours[family], network), PROMPTS)
    assert away(got, rounded) < (1e-5 if dtype == torch.float32 else 0.06)
