"""Declarations for modules of PyTorch that cost too much to import for everyone."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable


def when_imported(module: str, declare: Callable[[], None]) -> None:
    """Call `declare` once `module` is there: now, or right after somebody has imported it."""
    if module in sys.modules:
        declare()
    else:
        _finder.waiting.setdefault(module, []).append(declare)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are waited for, with a loader that tells when they are loaded."""

    def __init__(self):
        self.waiting: dict[str, list[Callable[[], None]]] = {}

    def find_spec(self, name, path, target=None):
        if name not in self.waiting:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_and_declare(module):
            load(module)
            for declare in self.waiting.pop(name, ()):
                declare()

        spec.loader.exec_module = load_and_declare
        return spec


_finder = _Finder()
sys.meta_path.insert(0, _finder)
