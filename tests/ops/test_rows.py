"""The ops over rows of D numbers, at shapes and layouts where their kernels take other paths."""

from functools import partial

import pytest
import test_gate_residual_norm
import test_norm_modulate
import test_sandwich_norm
import test_sandwich_norm_chain
import torch
from common import (
    BACKENDS,
    DTYPES,
    IMPLEMENTATIONS,
    OP_LEVELS,
    assert_accurate,
    assert_equal_results,
    at_cpu_level,
    cast,
    randn,
    run,
)

import lumina_kernels

MODULES = {
    "norm_modulate": test_norm_modulate,
    "gate_residual_norm": test_gate_residual_norm,
    "sandwich_norm": test_sandwich_norm,
    "sandwich_norm_chain": test_sandwich_norm_chain,
}
every_op = pytest.mark.parametrize(
    "op, kind",
    [
        *((op, kind) for op in list(MODULES)[:2] for kind in ("rms", "layer")),
        *((op, None) for op in list(MODULES)[2:]),
    ],
)


def assert_op_accurate(op, kind, shape, per_token, backend, dtype, **changed):
    inputs = MODULES[op].make_inputs(*shape, per_token) | ({"kind": kind} if kind else {}) | changed
    kernel = partial(getattr(lumina_kernels, op), backend=backend)
    assert_accurate(kernel, MODULES[op].eager, inputs, dtype)


@pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape, per_token",
    (
        ((2, 1, 8), False),
        ((1, 5, 2), True),
        ((2, 9, 100), False),
        ((1, 6, 576), True),
        ((2, 33, 144), False),
        ((2, 33, 144), True),
    ),
)
@every_op
def test_accuracy(op, kind, shape, per_token, backend, dtype):
    assert_op_accurate(op, kind, shape, per_token, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", OP_LEVELS)
@every_op
def test_chunks_of_rows_on_the_cpu(op, kind, level, dtype):
    with at_cpu_level(level):
        for D, per_token in ((33, True), (1040, False)):  # 1040: three chunks
            assert_op_accurate(op, kind, (2, 70, D), per_token, "cpu", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MODULES)
def test_transposed_and_expanded_views(op, backend):
    inputs = cast(MODULES[op].make_inputs(4, 3, 12))
    for name, x in inputs.items():
        if name == "gate":
            inputs[name] = x[:1, None].expand(3, 4, 12)
        elif x.ndim == 2:
            inputs[name] = x[:1].expand(3, 12)
        elif x.ndim == 3:
            inputs[name] = x.transpose(0, 1)
    packed = {name: x.contiguous() for name, x in inputs.items()}
    fn = partial(getattr(lumina_kernels, op), backend=backend)
    assert_equal_results(run(fn, inputs), run(fn, packed))


@pytest.mark.parametrize("D", (72, 520))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MODULES)
def test_misaligned_tensors(op, backend, D):
    inputs = cast(MODULES[op].make_inputs(2, 5, D), torch.float16)
    shifted = {name: torch.cat((x[..., :1], x), -1)[..., 1:] for name, x in inputs.items()}
    fn = partial(getattr(lumina_kernels, op), backend=backend)
    assert_equal_results(run(fn, shifted), run(fn, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@every_op
def test_every_term_is_optional(op, kind, backend):
    tensors = MODULES[op].make_inputs()
    names = tuple(name for name in tensors if name not in ("x", "y", "residual"))
    for left_out in (*((name,) for name in names), names):
        none = dict.fromkeys(left_out)
        assert_op_accurate(op, kind, (2, 3, 48), False, backend, torch.float32, **none)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("scale", "shift"))
@pytest.mark.parametrize("op", list(MODULES)[:2])
def test_one_modulation_per_token_and_one_per_sample(op, name, backend):
    per_token = {name: randn(2, 5, 48)}
    assert_op_accurate(op, "layer", (2, 5, 48), False, backend, torch.float32, **per_token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("op", list(MODULES)[2:])
def test_a_gate_without_tanh_or_without_weight(op, per_token, backend):
    for changed in ({"tanh": False}, {"weight": None}, {"tanh": False, "weight": None}):
        shape = (2, 5, 48)
        assert_op_accurate(op, None, shape, per_token, backend, torch.float32, **changed)


@pytest.mark.parametrize("backend", ("torch", *BACKENDS))
@pytest.mark.parametrize("L", (1, 5))
@pytest.mark.parametrize("op", MODULES)
def test_rows_of_samples_with_a_dimension_of_one_token(op, L, backend):
    """The same bits as without it, and gradients with it; one token has either reading."""
    inputs = cast(MODULES[op].make_inputs(2, L, 48))
    rows = {name: x[:, None] for name, x in inputs.items() if x.shape == (2, 48)}
    fn = partial(getattr(lumina_kernels, op), backend=backend)
    plain, found = run(fn, inputs), run(fn, inputs | rows)
    for name in rows:
        assert found[f"d{name}"].shape == (2, 1, 48)
        found[f"d{name}"] = found[f"d{name}"][:, 0]
    if L == 1:
        torch.testing.assert_close(found, plain)
    else:
        assert_equal_results(found, plain)


@pytest.mark.parametrize("op", list(MODULES)[1:])
def test_the_residual_decides_the_dtype(op):
    inputs = cast(MODULES[op].make_inputs())
    outs = getattr(lumina_kernels, op)(**inputs | {"y": inputs["y"].bfloat16()})
    outs = (outs,) if isinstance(outs, torch.Tensor) else outs
    assert [out.dtype for out in outs] == [torch.float32] * len(outs)
