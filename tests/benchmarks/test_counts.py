"""The benchmarks of the ops, on small shapes: their bytes and FLOPs are counted independently, and
their variants compared."""

from contextlib import suppress
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
from common import needs_kernels
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.ops
from benchmarks.harness.case import (
    Unavailable,
    as_tuple,
    caller,
    difference,
    is_floating_tensor,
    ours,
)
from lumina_kernels.ops import OPS
from lumina_kernels.ops.gqa_attention import gqa_attention_ref

FILES = Path(benchmarks.ops.__file__).parent.glob("bench_*.py")
BENCHED = sorted(path.stem.removeprefix("bench_") for path in FILES)
SIZES = ((5, 2, "bfloat16"), (4, 1, "float32"))  # side, B, dtype


def bench(op):
    return import_module(f"benchmarks.ops.bench_{op}")


def small_shapes(op) -> list:
    """The shapes of the file with small sizes; masks, text and gradients are kept."""
    shapes = {}
    for shape, (side, B, dtype) in product(bench(op).SHAPES, SIZES):
        groups = 4 if shape.G == shape.H else 2
        small = shape.but(
            model=f"G{groups}", D=48, H=4, G=groups, K=12, F=40, side=side, B=B, T=7, Y=8,
            dtype=dtype, quick=False, devices=("cpu",),
        )  # fmt: skip
        shapes[small] = pytest.param(op, small, id=f"{op}-{small}")
    return list(shapes.values())


cases = pytest.mark.parametrize(
    ("op", "shape"), [param for op in BENCHED for param in small_shapes(op)]
)


def test_every_op_has_a_benchmark():
    assert BENCHED == sorted(OPS)


@pytest.mark.parametrize("op", BENCHED)
def test_the_first_shape_of_a_device_is_the_quick_one(op):
    for device in ("cpu", "cuda"):
        shapes = [shape for shape in bench(op).SHAPES if device in shape.devices]
        assert [shape.quick for shape in shapes] == [True, *[False] * (len(shapes) - 1)]
        assert len(set(map(str, shapes))) == len(shapes)  # they name the tests


@pytest.mark.parametrize("op", BENCHED)
def test_ops_with_a_gradient_are_timed_with_it(op):
    has_gradient = hasattr(import_module(f"lumina_kernels.ops.{op}"), f"{op}_bwd")
    for device in ("cpu", "cuda"):
        shapes = [shape for shape in bench(op).SHAPES if device in shape.devices]
        assert sum(shape.backward for shape in shapes) == has_gradient


@cases
def test_bytes_are_those_of_inputs_and_outputs(op, shape, monkeypatch):
    case, constants = case_and_constants(op, shape, monkeypatch)
    outputs = as_tuple(case.eager(**case.inputs))
    # Tables with a row for each token are read too. Constants of at most K numbers are not counted.
    tables = [z for z in constants.values() if isinstance(z, Tensor) and len(z) == shape.L]
    inputs = [z for z in case.inputs.values() if isinstance(z, Tensor)]
    expected = sum(z.nbytes for z in (*inputs, *tables, *outputs))
    assert case.bytes == (None if shape.backward else expected)


@cases
def test_flops_are_those_of_the_definition(op, shape):
    case = bench(op).case(shape, "cpu")
    if op == "gqa_attention":
        expected = attention_flops(**case.inputs)
    else:
        expected = flops(case.eager, **case.inputs)
    assert case.flops == (None if shape.backward or expected == 0 else expected)


@needs_kernels
@cases
def test_variants_agree(op, shape):
    case = bench(op).case(shape, "cpu")
    assert case.backward == shape.backward
    expected = caller(case.eager, case, case.inputs)()
    for name, function in case.ours.items():
        difference(name, caller(function, case, case.inputs)(), expected)
    for name, make in case.peers.items():
        with suppress(Unavailable, ImportError):
            if name not in (*case.not_equivalent, "flex"):  # flex takes seconds to compile
                difference(name, caller(make(), case, case.inputs)(), expected)


@needs_kernels
@cases
def test_a_variant_that_misreads_an_input_is_caught(op, shape):
    case = bench(op).case(shape, "cpu")
    expected = as_tuple(case.eager(**case.inputs))
    for name, value in case.inputs.items():
        if is_floating_tensor(value):
            results = as_tuple(case.ours["lumina-cpu"](**(case.inputs | {name: -value})))
            with pytest.raises(AssertionError, match="differs from eager"):
                difference(name, results, expected)


def case_and_constants(op, shape, monkeypatch):
    """A case, and the arguments of the op that are not among its inputs."""
    constants = {}

    def record_constants(function, device, **arguments):
        constants.update(arguments)
        return ours(function, device, **arguments)

    monkeypatch.setattr(bench(op), "ours", record_constants)
    return bench(op).case(shape, "cpu"), constants


def flops(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def attention_flops(text_gate=None, **inputs) -> int:
    """FLOPs of the definition, one sample at a time, without the keys that are masked out."""
    total = 0
    for sample in range(len(inputs["q"])):
        rows = {name: z[sample : sample + 1] for name, z in inputs.items()}
        for mask, names in (("key_mask", ("k", "v")), ("text_mask", ("text_k", "text_v"))):
            if mask in rows:
                valid = rows.pop(mask)[0]
                rows |= {name: rows[name][:, valid] for name in names}
        total += flops(gqa_attention_ref, **rows, text_gate=text_gate)
    return total
