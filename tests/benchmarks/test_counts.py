"""The benchmarks of the ops on small shapes: their bytes and FLOPs counted anew, their variants."""

import inspect
from contextlib import suppress
from importlib import import_module
from itertools import product

import pytest
from test_layout import OPS, ROOT
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from lumina_kernels.backend import MISSING
from lumina_kernels.ops.gqa_attention import gqa_attention_ref

BENCHED = [op for op in OPS if (ROOT / "benchmarks" / f"bench_{op}.py").exists()]
SIZES = ((5, 2, "bfloat16"), (4, 1, "float32"))  # side, B, dtype


def bench(op):
    return import_module(f"benchmarks.bench_{op}")


def small_shapes(op) -> list:
    """The shapes of the file, their masks and gradients, with small sizes."""
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
needs_kernels = pytest.mark.skipif("cpu" in MISSING, reason="the C++ kernels are not built")


def test_every_op_has_a_benchmark():
    assert BENCHED == OPS


@pytest.mark.parametrize("op", BENCHED)
def test_the_first_shape_of_a_device_is_the_quick_one(op):
    for device in ("cpu", "cuda"):
        shapes = [shape for shape in bench(op).SHAPES if device in shape.devices]
        assert [shape.quick for shape in shapes] == [True, *[False] * (len(shapes) - 1)]
        assert len(set(map(str, shapes))) == len(shapes)  # they are the tests' names


@pytest.mark.parametrize("op", BENCHED)
def test_ops_with_a_gradient_are_timed_with_it(op):
    has_gradient = "register_autograd" in inspect.getsource(
        import_module(f"lumina_kernels.ops.{op}")
    )
    for device in ("cpu", "cuda"):
        shapes = [shape for shape in bench(op).SHAPES if device in shape.devices]
        assert sum(shape.backward for shape in shapes) == has_gradient


@cases
def test_bytes_are_those_of_inputs_and_outputs(op, shape, monkeypatch):
    case, constants = case_and_constants(op, shape, monkeypatch)
    outputs = measure.as_tuple(case.eager(**case.inputs))
    # Tables with a row per token are read too. What has K numbers or less is left out.
    tables = [z for z in constants.values() if isinstance(z, Tensor) and len(z) == shape.L]
    inputs = [z for z in case.inputs.values() if isinstance(z, Tensor)]
    assert (case.bytes == 0) == shape.backward
    assert case.bytes in (0, sum(z.nbytes for z in (*inputs, *tables, *outputs)))


@cases
def test_flops_are_those_of_the_definition(op, shape):
    case = bench(op).case(shape, "cpu")
    if op == "gqa_attention":
        expected = attention_flops(**case.inputs)
    else:
        expected = flops(case.eager, **case.inputs)
    assert case.flops == (0 if shape.backward else expected)


@needs_kernels
@cases
def test_variants_agree(op, shape):
    case = bench(op).case(shape, "cpu")
    assert case.backward == shape.backward
    expected = measure.caller(case.eager, case, case.inputs)()
    for name, function in case.ours.items():
        measure.difference(name, measure.caller(function, case, case.inputs)(), expected)
    for name, make in case.peers.items():
        with suppress(measure.Absent, ImportError):
            if name not in (*case.own_result, "flex"):  # which takes seconds to compile
                measure.difference(name, measure.caller(make(), case, case.inputs)(), expected)


@needs_kernels
@cases
def test_a_variant_that_takes_an_input_wrong_is_caught(op, shape):
    case = bench(op).case(shape, "cpu")
    expected = measure.as_tuple(case.eager(**case.inputs))
    for name, value in case.inputs.items():
        if measure.is_float(value):
            results = measure.as_tuple(case.ours["lumina-cpu"](**(case.inputs | {name: -value})))
            with pytest.raises(AssertionError, match="differs from eager"):
                measure.difference(name, results, expected)


def case_and_constants(op, shape, monkeypatch):
    """A case, and the arguments of the op that are not among its inputs."""
    constants = {}

    def noted(function, device, **arguments):
        constants.update(arguments)
        return measure.ours(function, device, **arguments)

    monkeypatch.setattr(bench(op), "ours", noted)
    return bench(op).case(shape, "cpu"), constants


def flops(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def attention_flops(text_gate=None, **inputs) -> int:
    """Of the definition, a sample at a time, without the keys that its masks leave out."""
    total = 0
    for sample in range(len(inputs["q"])):
        rows = {name: z[sample : sample + 1] for name, z in inputs.items()}
        for mask, names in (("key_mask", ("k", "v")), ("text_mask", ("text_k", "text_v"))):
            if mask in rows:
                valid = rows.pop(mask)[0]
                rows |= {name: rows[name][:, valid] for name in names}
        total += flops(gqa_attention_ref, **rows, text_gate=text_gate)
    return total
