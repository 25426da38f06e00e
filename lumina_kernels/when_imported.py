"""Declarations for modules of PyTorch that take too long to import for everyone."""

import importlib.abc
import sys
from collections.abc import Callable


def when_imported(module: str, declare: Callable[[], None]) -> None:
    """Call `declare` now if `module` is imported, otherwise right after its first import.

    A declaration that fails makes that import fail, and is tried again by the next one.
    """
    if module in sys.modules:
        declare()
    else:
        _finder.awaited.setdefault(module, []).append(declare)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited modules and runs their declarations once they are loaded."""

    def __init__(self):
        self.awaited: dict[str, list[Callable[[], None]]] = {}

    def find_spec(self, name, path, target=None):
        if name not in self.awaited:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return None
        load = spec.loader.exec_module

        def load_and_declare(module):
            load(module)
            while self.awaited.get(name):
                self.awaited[name][0]()
                self.awaited[name].pop(0)
            self.awaited.pop(name, None)

        spec.loader.exec_module = load_and_declare
        return spec


_finder = _Finder()
sys.meta_path.insert(0, _finder)
