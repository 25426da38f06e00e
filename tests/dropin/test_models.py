"""Patched models compute what they did: within float32's rounding, and in 16 bits no further from
the truth than before."""

import pytest
import torch
from models import MODELS, cast, make, output, to_dtype

from lumina_kernels.dropin import patch, unpatch


@pytest.fixture(autouse=True)
def fresh():
    """Dynamo makes a size dynamic that another model of the same code had otherwise."""
    torch._dynamo.reset()


def error(out, truth):
    return ((out.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_float32(name):
    model, inputs = make(name)
    want = output(model, inputs)
    report = patch(model)
    got = output(model, inputs)
    assert report.fused > 0 and got.dtype == want.dtype
    assert ((got - want).abs().max() / want.square().mean().sqrt()).item() <= 2e-5
    unpatch(model)
    assert torch.equal(output(model, inputs), want)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sixteen_bits(name, dtype):
    model, inputs = make(name)
    model, inputs = to_dtype(model, dtype), cast(inputs, dtype)
    eager = output(model, inputs)
    wide, _ = make(name)
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    truth = output(wide, cast(inputs, torch.float32)).double()
    report = patch(model)
    got = output(model, inputs)
    assert report.fused > 0 and got.dtype == eager.dtype
    assert error(got, truth) <= 1.15 * error(eager, truth)
