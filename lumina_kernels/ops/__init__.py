"""One file per op: the public function, its definition `<op>_ref`, and its checks."""

from pathlib import Path

OPS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))
