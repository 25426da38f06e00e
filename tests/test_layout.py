"""One op, one name: everything that belongs to an op is found by its name, and none is missing."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import lumina_kernels

ROOT = Path(__file__).parent.parent
OPS = sorted(path.stem for path in (ROOT / "lumina_kernels" / "ops").glob("[a-z]*.py"))


def test_ops_are_found():
    assert len(OPS) >= 12


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_complete(op):
    places = (
        "tests/ops/test_{}.py",
        "lumina_kernels/examples/{}.py",
        "lumina_kernels/triton/{}.py",
    )
    for place in (*places, "csrc/cpu/{}.cpp", "csrc/cuda/{}.cuh", "csrc/cuda/{}.cu"):
        assert (ROOT / place.format(op)).exists(), place.format(op)
    line = f"from lumina_kernels.ops.{op} import {op} as {op}\n"
    assert line in (ROOT / "lumina_kernels" / "__init__.py").read_text()


@pytest.mark.parametrize("op", OPS)
def test_backend_is_the_last_argument(op):
    *_, last = inspect.signature(getattr(lumina_kernels, op)).parameters.values()
    assert (last.name, last.kind, last.default) == ("backend", last.KEYWORD_ONLY, None)


@pytest.mark.parametrize("op", OPS)
def test_the_definition_is_short_and_takes_the_same_arguments(op):
    reference = getattr(import_module(f"lumina_kernels.ops.{op}"), f"{op}_ref")
    public = inspect.signature(getattr(lumina_kernels, op)).parameters
    expected = [(p.name, p.default) for p in public.values() if p.name != "backend"]
    assert [
        (p.name, p.default) for p in inspect.signature(reference).parameters.values()
    ] == expected
    source = inspect.getsource(reference)
    body = ast.parse(source).body[0].body[1:]  # without the docstring
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    assert len([line for line in lines if line.strip()]) <= 15
