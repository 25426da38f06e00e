"""`import lumina` brings its names when they are used, and PyTorch not before."""

import ast
import subprocess
import sys
from pathlib import Path

import lumina


def test_every_name_is_declared_alike():
    tree = ast.parse(Path(lumina.__file__).read_text())
    declared = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lumina."):
            declared |= {alias.name: node.module.removeprefix("lumina.") for alias in node.names}
    declared["reference"] += ".reference"  # a module itself
    assert declared == {**lumina._MODULES, **lumina._OPTIONAL}
    own = sorted(lumina._MODULES, key=lambda n: (not n.isupper(), n.islower(), n))
    assert lumina.__all__ == own
    for name in declared:
        assert getattr(lumina, name) is not None and name in dir(lumina)


def test_pytorch_is_not_imported_before_it_is_needed():
    code = (
        "import sys, lumina, lumina.cli; assert 'torch' not in sys.modules;"
        "from lumina import *; assert sample is lumina.sample and callable(sample);"
        "assert lumina.reference.NextDiT is not lumina.NextDiT; print(hasattr(lumina, 'nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
