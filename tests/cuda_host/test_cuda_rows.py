"""The kernels over rows at every width class, and what only they do: see csrc/cuda/lib/rows.cuh."""

from functools import partial

import pytest
import test_gate_residual_norm
import test_norm_modulate
import test_sandwich_norm
import test_sandwich_norm_chain
import torch
from common import assert_accurate, assert_equal_results, run
from cuda_host.backend import cuda_on_host

import lumina_kernels

FILES = (
    test_norm_modulate,
    test_sandwich_norm,
    test_sandwich_norm_chain,
    test_gate_residual_norm,
)
NAMES = [module.__name__.removeprefix("test_") for module in FILES]


@pytest.fixture(autouse=True)
def host():
    with cuda_on_host() as host:
        yield host


@pytest.fixture(params=FILES, ids=NAMES)
def case(request):
    """The op on the host, its inputs and its eager form."""
    module = request.param
    op = getattr(lumina_kernels, module.__name__.removeprefix("test_"))
    return partial(op, backend="cuda"), module.make_inputs, module.eager


# A warp, a block with one and with four pieces a thread, and more than it holds; widths that take
# 16-byte accesses and such that do not.
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("D", (72, 73, 264, 511, 1160, 4104, 8191, 8200, 12301))
def test_widths(D, dtype, case):
    op, make_inputs, eager = case
    assert_accurate(op, eager, make_inputs(2, 3, D), dtype)


def test_wide_rows_with_modulations_per_token(case):
    op, make_inputs, eager = case
    assert_accurate(op, eager, make_inputs(1, 2, 8200, True), torch.float16)


def test_wide_layer_and_rms_norms():
    for module in (test_norm_modulate, test_gate_residual_norm):
        op = getattr(lumina_kernels, module.__name__.removeprefix("test_"))
        for kind in ("rms", "layer"):
            inputs = module.make_inputs(2, 2, 8200) | {"kind": kind}
            assert_accurate(partial(op, backend="cuda"), module.eager, inputs, torch.float32)


# Sums over rows: one sample with many chunks, more samples than slices, chunks of 16 rows.
@pytest.mark.parametrize("B, L, D", ((1, 150, 40), (21, 5, 33), (2, 2053, 8)))
def test_sums_over_rows(B, L, D, case):
    op, make_inputs, eager = case
    assert_accurate(op, eager, make_inputs(B, L, D), torch.float32)


@pytest.mark.parametrize("D", (72, 520))
def test_misaligned_tensors_give_the_same_bits(D, case):
    op, make_inputs, _ = case
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(2, 5, D).items()}
    shifted = {name: torch.cat((t[..., :1], t), -1)[..., 1:] for name, t in inputs.items()}
    assert_equal_results(run(op, shifted), run(op, inputs))
