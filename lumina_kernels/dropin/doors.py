"""The ways into the pass: `patch`, `unpatch` and the Dynamo backend."""

import itertools
import types
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.fx import GraphModule

from lumina_kernels.dropin.capture import capture
from lumina_kernels.dropin.fuse import fuse
from lumina_kernels.dropin.report import Captured, Report

_PATCHED: weakref.WeakKeyDictionary[nn.Module, "_Patch"] = weakref.WeakKeyDictionary()


def patch(model, *, backend: str | None = None) -> Report:
    """Have the repeated blocks of a diffusion transformer run on the fused ops, in place.

    Every element of the model's lists of modules is captured when it first runs, its norms,
    rotations, attentions, gates and gated units are replaced by ops of this package where these
    compute the same, and the rewritten graph runs from then on, without a compiler. What does not
    match stays as it is. Parameters, state dict, class names and hooks are untouched; copies and
    pickles of the model are unpatched. A second call returns the same report.

    Args:
        model: an nn.Module, or a pipeline that holds some in `components`.
        backend: of the ops, for every one that is replaced; see `lumina_kernels.backend`.

    Returns:
        a `Report`, which fills as the blocks run.

    Raises:
        ValueError: the model has no repeated blocks.
    """
    network = _network(model)
    if network in _PATCHED:
        return _PATCHED[network].report
    blocks = repeated_blocks(network)
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no lists of blocks to patch")
    _PATCHED[network] = _Patch(blocks, backend)
    return _PATCHED[network].report


def unpatch(model) -> None:
    """Undo `patch`; nothing happens to a model that is not patched."""
    if patched := _PATCHED.pop(_network(model), None):
        for block in patched.blocks.values():
            block._compiled_call_impl = None
        for module, name, own in patched.shared:
            with torch.no_grad():
                own.copy_(getattr(module, name))
            setattr(module, name, own)


def compile_backend(gm: GraphModule, inputs: list) -> Callable:
    """`torch.compile(model, backend="lumina_kernels")`: the pass, then Inductor."""
    from torch._inductor.compile_fx import compile_fx

    whole = capture(gm)
    fuse(whole)
    return compile_fx(whole, inputs)


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the outermost lists of modules, by path."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{block}.") for block in found):
            continue
        if isinstance(module, nn.ModuleList) and all(_is_block(m) for m in module):
            found |= {f"{path}.{i}" if path else str(i): m for i, m in enumerate(module)}
    return found


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList) and len(list(module.modules())) > 3


def _network(model) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    networks = [m for m in getattr(model, "components", {}).values() if isinstance(m, nn.Module)]
    networks = [m for m in networks if hasattr(m, "config") and repeated_blocks(m)]
    if not networks:
        raise ValueError(f"{type(model).__name__} is no module and has none in components")
    return networks[0]


class _Patch:
    """The blocks of one model, and the graphs that they have run."""

    def __init__(self, blocks: dict[str, nn.Module], backend: str | None):
        self.blocks, self.backend, self.current = blocks, backend, ""
        self.report = Report(list(blocks))
        self.shared = [pair for block in blocks.values() for pair in _share_equal(block)]
        for path, block in blocks.items():
            block._compiled_call_impl = self._entry(path, block)

    def _entry(self, path: str, block: nn.Module) -> Callable:
        run = self._compiled(type(block))

        def call(*args, **kwargs):
            self.current = path
            return run(block, args, kwargs)

        return call

    def _compiled(self, kind: type) -> Callable:
        """One function for the blocks of a class, with code of its own: Dynamo counts the graphs
        of a piece of code, and gives up after eight, whoever runs it."""
        own = types.FunctionType(_call.__code__.replace(co_name=kind.__name__), globals())
        found = self.__dict__.setdefault("_functions", {})
        if kind not in found:
            found[kind] = torch.compile(own, backend=self._rewrite)
        return found[kind]

    def _rewrite(self, gm: GraphModule, inputs: list) -> Callable:
        whole = capture(gm)
        captured = Captured(fuse(whole, self.backend))
        self.report.graphs.append(captured)
        run = whole.forward

        def counted(*args):
            captured.calls[self.current] += 1
            return run(*args)

        return counted


def _share_equal(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Let two sublayers with an equal projection have the same parameters there, and in what else
    they share by name: two attentions of one query, say, which is then computed once. Returns what
    was replaced."""
    replaced = []
    sublayers = [dict(layer.named_children()) for layer in block.children()]
    for first, second in itertools.combinations(sublayers, 2):
        equal = [
            (first[name], second[name])
            for name in first.keys() & second.keys()
            if type(first[name]) is type(second[name]) and _is_equal(first[name], second[name])
        ]
        if not any(p.ndim > 1 and p.min() < p.max() for one, _ in equal for p in one.parameters()):
            continue  # vectors of ones are equal by chance
        for one, other in equal:
            for name, own in list(other.named_parameters(recurse=False)):
                replaced.append((other, name, own))
                setattr(other, name, getattr(one, name))
    return replaced


def _is_equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers have parameters of their own, all equal."""
    a, b = (dict(m.named_parameters(recurse=False)) for m in (one, other))
    return bool(a) and a.keys() == b.keys() and all(
        x.shape == b[n].shape and x.dtype == b[n].dtype and x.device == b[n].device
        and not x.is_meta and x is not b[n] and torch.equal(x, b[n])
        for n, x in a.items()
    )  # fmt: skip


def _call(block, args, kwargs):
    return block._call_impl(*args, **kwargs)
