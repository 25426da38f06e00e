"""One op, one name: everything that belongs to an op is found by its name, and none is missing."""

import ast
import inspect
import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import lumina_kernels
from lumina_kernels.ops import OPS

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "csrc", "examples", "lumina", "lumina_kernels", "tests")


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


def sources(*suffixes):
    """Files with these suffixes. Not from git, which an sdist lacks."""
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return [path for path in paths if path.suffix in suffixes]


def test_no_file_is_long():
    paths = [ROOT / "setup.py", *sources(".py", ".cpp", ".cu", ".cuh", ".h")]
    lines = {str(path): len(path.read_text().splitlines()) for path in paths}
    assert len(lines) > 200
    assert not {path: n for path, n in lines.items() if n > 350}


def test_no_triton_kernel_has_many_parameters():
    counts = {}
    for path in (ROOT / "lumina_kernels" / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any("triton.jit" in ast.unparse(line) for line in node.decorator_list):
                    of = node.args
                    counts[node.name] = len(of.posonlyargs + of.args + of.kwonlyargs)
    assert len(counts) > 20
    assert not {name: n for name, n in counts.items() if n > 25}


def test_no_type_of_csrc_is_defined_twice():
    definition = re.compile(r"^\s*(?:struct|class|enum(?: class)?) (\w+)[^;(){]*\{", re.MULTILINE)
    names = Counter()
    for path in sources(".cpp", ".cu", ".cuh", ".h"):
        if path.is_relative_to(ROOT / "csrc"):
            names.update(definition.findall(path.read_text()))
    assert len(names) > 100
    assert not {name: n for name, n in names.items() if n > 1}


def test_no_file_of_tests_changes_another_module_when_imported():
    """All tests of that process would see it."""
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        body = ast.parse(path.read_text()).body
        imports = [x for x in body if isinstance(x, ast.Import | ast.ImportFrom)]
        names = {alias.asname or alias.name.split(".")[0] for x in imports for alias in x.names}
        for line in body:
            targets = getattr(line, "targets", [getattr(line, "target", None)])
            owners = [x.value for x in targets if isinstance(x, ast.Attribute | ast.Subscript)]
            if any(ast.unparse(x).split(".")[0] in names for x in owners):
                found.append(f"{path.name}: {ast.unparse(line)}")
    # It is a program's own, which imitates a GPU.
    assert not [line for line in found if not line.startswith("sitecustomize.py")]
