"""The ways into the graph pass: `patch`, `unpatch` and the Dynamo backend."""

import itertools
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from lumina_kernels.backend import BEST_FIRST, DEVICES, resolve
from lumina_kernels.patch_report import Captured, Report, Site
from lumina_kernels.patch_sharing import equal_parameters, same_bits
from lumina_kernels.patch_verify import verify
from lumina_kernels.when_imported import when_imported

COMPILE = 'torch.compile(model, backend="lumina_kernels")'


def patch(
    model, *, backend: str | None = None, exact: bool = False, verify: bool = False
) -> Report:
    """Have the repeated blocks of a diffusion transformer run on the fused ops, in place.

    Every element of the model's lists of modules is captured when it first runs; its norms,
    rotations, attentions, gates and activations are replaced by ops of this package where these
    compute the same, and the rewritten graph runs from then on, without a compiler. What does not
    match stays as it is. Parameters, state dict and class names are untouched; copies and pickles
    of the model are unpatched. Hooks of a block run as ever, whenever they were added. While a
    module inside of a block has hooks, or all modules have, the block runs as it was. A second call
    returns the same report, and patches blocks that were added since. A model that is compiled as a
    whole has `compile_backend` instead, and `torch.export` exports the blocks as they were.

    Where two attentions of a block have equal query projections (Lumina-Next), the queries are
    computed once, when no gradient is wanted: on the CPU each call compares the weights. Elsewhere,
    where to compare would make the host wait, they have to be one module: `attn2.to_q = attn1.to_q`
    and `attn2.norm_q = attn1.norm_q`.

    The ops have gradients, but not those of second order nor of forward mode: these raise
    NotImplementedError, and need the model as it was.

    Args:
        model: an nn.Module, or a pipeline, whose components named transformer... are patched.
        backend: of the ops, for every one that is replaced; see `lumina_kernels.backend`.
        exact: replace only what the model rounds once, so that 16-bit results of every replaced
            part stay what they were but for single last bits: LayerNorm and torch's RMSNorm by
            themselves, rotations, activations, chains in float32.
        verify: compare each block with the original in its first forward, which needs no gradient.
            The block runs up to three more times for it, without its hooks; buffers and random
            numbers are then as one run leaves them.

    Returns:
        a `Report`, which fills as the blocks run.

    Raises:
        ValueError: the model has no repeated blocks, is compiled, or is patched with other options
            or, in a part, by itself. No part of it is patched then.
        ArithmeticError: in a forward, with verify=True: a block is not as accurate as it was. In
            float32 max|difference| / rms must be at most 2e-5; in 16 bits the error against the
            block in float32 at most 1.15 times the original's.
    """
    networks, way = _networks(model), (backend, exact, verify)
    patches = [_patch_of(network) for network in networks.values()]
    if any(patched and patched.way != way for patched in patches):
        raise ValueError("the model is patched with other options: call unpatch first")
    if backend is not None:
        # Where the model will run: the weights of an offloaded one are on "cpu" or "meta".
        is_gpu = torch.cuda.is_available() and DEVICES.get(backend) == "cuda"
        resolve(backend, BEST_FIRST, torch.empty(0, device="cuda" if is_gpu else "cpu"))
    report = next((patched.report for patched in patches if patched), Report())
    for (prefix, network), patched in zip(networks.items(), patches, strict=True):
        (patched or _Patch(network, prefix, way, report)).enter_blocks()
    return report


def unpatch(model) -> None:
    """Undo `patch`; nothing happens to a model that is not patched."""
    for network in _networks(model).values():
        for module in network.modules():
            if hasattr(module._compiled_call_impl, "patched"):
                module._compiled_call_impl = None


def _patch_of(network: nn.Module) -> "_Patch | None":
    """What a model is patched by, itself or a model that it is in. Only modules hold it."""
    entries = [m._compiled_call_impl for m in network.modules() if m._compiled_call_impl]
    if not all(hasattr(entry, "patched") for entry in entries):
        raise ValueError(f"the model is compiled: patch it before, or use {COMPILE}")
    patches = {id(entry.patched): entry.patched for entry in entries}
    inside = {id(module) for module in network.modules()} - {id(network)}
    if len(patches) > 1 or any(id(patched.network) in inside for patched in patches.values()):
        raise ValueError("a part of the model is patched by itself: call unpatch first")
    return next(iter(patches.values()), None)


def compile_backend(
    gm: GraphModule, inputs: list, mode: str | None = None, options: dict | None = None
) -> Callable:
    """`torch.compile(model, backend="lumina_kernels")`: the pass over whole graphs, then Inductor.

    Gradients come from the ops' own backward. `mode` and `options` are Inductor's."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    settings = (list_mode_options(mode) if mode else {}) | (options or {})
    return compile_fx(_fused(gm)[0], inputs, config_patches=settings)


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the outermost lists of modules, by path."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{block}.") for block in found)
        if isinstance(module, nn.ModuleList) and not is_inside and all(map(_is_block, module)):
            found |= {f"{path}.{i}".lstrip("."): block for i, block in enumerate(module)}
    return found


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList) and len(list(module.modules())) > 3


def _networks(model) -> dict[str, nn.Module]:
    """The transformers of a pipeline by name, or a model as it is."""
    found = {"": model}
    if not isinstance(model, nn.Module):
        parts = {f"{name}.": part for name, part in getattr(model, "components", {}).items()}
        found = {n: m for n, m in parts.items() if n[:11] == "transformer" and m is not None}
        if not found:
            raise ValueError(f"{type(model).__name__} is no module and has no transformer")
    found = {id(network): (name, network) for name, network in reversed(found.items())}
    found = dict(reversed(found.values()))  # what has two names once, by the first
    for network in found.values():
        if hasattr(network, "_orig_mod"):
            raise ValueError(f"the model is compiled: patch it before, or use {COMPILE}")
        if not repeated_blocks(network):
            raise ValueError(f"{type(network).__name__} has no lists of blocks to patch")
    return found


def _fused(gm: GraphModule, *options) -> tuple[GraphModule, Captured]:
    """The graph on the ops, or as it was where that fails: an upstream that changes costs speed."""
    from lumina_kernels.dropin.fuse import capture, fuse

    try:
        # Checkpointing counts what is saved for the backward, and nothing is computed here.
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            fused, sites = fuse(capture(gm), *options)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if not isinstance(error, NotImplementedError):
            reason = f"its capture failed: {type(error).__name__}: {reason}"
        warnings.warn(f"a graph is left as it is, {reason}", stacklevel=2)
        fused, sites = gm, [Site("graph", "", None, reason)]
    return fused, Captured(sites)


class _Patch:
    """The blocks of one model, and the graphs that they have run."""

    def __init__(self, network: nn.Module, prefix: str, way: tuple, report: Report):
        self.network, self.prefix, self.way, self.report = network, prefix, way, report
        self.functions, self.graphs = {}, {}
        self.warned, self.lock = set(), threading.RLock()
        this = weakref.ref(self)  # Dynamo keeps a backend, and what it returned, for ever
        self.backend = lambda gm, inputs: this()._rewrite(gm, inputs)
        network._compiled_call_impl = entry = partial(_call_network, network)
        entry.patched = self

    def enter_blocks(self) -> None:
        """Have the blocks that do not yet run by it do so. One in two places has its first name."""
        for path, block in repeated_blocks(self.network).items():
            if block._compiled_call_impl is None:
                block._compiled_call_impl = _Block(self, self.prefix + path, block)
                if self.prefix + path not in self.report.blocks:
                    self.report.blocks.append(self.prefix + path)

    def function(self, kind: type) -> Callable:
        """One function for the blocks of a class, with code and globals of its own: Dynamo counts
        the graphs of a piece of code, and gives up after eight, whoever runs it."""
        if kind not in self.functions:
            code = _forward.__code__.replace(co_name=kind.__name__)
            own = types.FunctionType(code, dict(globals()))
            self.functions[kind] = torch.compile(own, backend=self.backend)
            forget = weakref.finalize(self, torch._dynamo.eval_frame.remove_from_cache, own)
            forget.atexit = False
        return self.functions[kind]

    def _rewrite(self, gm: GraphModule, inputs: list) -> Callable:
        module = _running.block.module
        pairs = equal_parameters(module, inputs) if not torch.is_grad_enabled() else []
        fused, captured = _fused(gm, *self.way[:2])
        apart = self._counted(fused, captured)
        if not pairs or fused is gm:
            return apart
        nodes = gm.graph.find_nodes(op="placeholder")
        for kept, other in pairs:
            nodes[other].replace_all_uses_with(nodes[kept])
        gm.recompile()
        shared = self._counted(*_fused(gm, *self.way[:2]))

        def run(*args):
            is_equal = all(same_bits(args[kept], args[other]) for kept, other in pairs)
            return (shared if is_equal else apart)(*args)

        return run

    def _counted(self, fused: GraphModule, captured: Captured) -> Callable:
        number = object()
        self.report.graphs.append(captured)
        self.graphs[number] = fused.forward, captured

        def run(*args):
            block = _running.block
            forward, captured = block.patched.graphs[number]
            captured.calls[block.path] += block.counts
            return forward(*args)

        return run

    def ran_unfused(self, block: "_Block", reason: str) -> None:
        if torch._C._len_torch_dispatch_stack():
            reason = "a dispatch mode is active, in which Dynamo does not run"
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"{type(block.module).__name__} runs unfused: {reason}", stacklevel=4)
        self.report.unfused[block.path] += 1


class _Block:
    """What a patched block does when it is called: its hooks, around the graphs of its forward."""

    def __init__(self, patched: _Patch, path: str, module: nn.Module):
        self.patched, self.path, self.module = patched, path, module
        self.compiled, self.lock = patched.function(type(module)), threading.RLock()
        self.is_new, self.is_verified, self.counts = True, not patched.way[2], True
        self.last_handle, self.has_hooks_inside = None, False

    def __call__(self, *args, **kwargs):
        module = self.module
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return module._call_impl(*args, **kwargs)
        if _has_any_global_hook() or self._hooks_inside():
            self.patched.ran_unfused(self, "modules inside of it have hooks")
            return module._call_impl(*args, **kwargs)
        own = vars(module).get("forward")
        if not self.is_verified:
            with self.lock:
                self._verify(own, args, kwargs)
        return self._hooked(args, kwargs) if _has_hooks(module) else self.run(own, *args, **kwargs)

    def run(self, own: Callable | None, *args, **kwargs):
        """The forward, fused; `own` is what stands in its place on the module, if anything does."""
        before, _running.block = getattr(_running, "block", None), self
        try:
            if not self.is_new:
                return self.compiled(self.module, own, args, kwargs)
            with self.patched.lock:  # threads would each make the same graphs
                result = self.compiled(self.module, own, args, kwargs)
                self.is_new = False
                return result
        finally:
            _running.block = before

    def _hooked(self, args: tuple, kwargs: dict):
        """The module's own call, hooks and all, which meanwhile finds the fused forward."""
        attributes = vars(self.module)
        with self.lock:
            own = attributes.get("forward")
            attributes["forward"] = fused = partial(self.run, own)
            try:
                return self.module._call_impl(*args, **kwargs)
            finally:
                if attributes.get("forward") is fused:
                    del attributes["forward"]
                    attributes |= {"forward": own} if own else {}

    def _hooks_inside(self) -> bool:
        """Whether a module inside has hooks. Every new one, anywhere, takes the next handle."""
        if self.has_hooks_inside or self.last_handle != RemovableHandle.next_id:
            self.last_handle = RemovableHandle.next_id
            inside = itertools.islice(self.module.modules(), 1, None)
            self.has_hooks_inside = any(map(_has_hooks, inside))
        return self.has_hooks_inside

    def _verify(self, own: Callable | None, args: tuple, kwargs: dict) -> None:
        if not self.is_verified:
            self.counts = False
            try:
                verify(self.path, self.module, partial(self.run, own), args, kwargs)
            finally:
                self.counts = True
            self.is_verified = True


_running = threading.local()  # .block: whose graphs are made or run in this thread


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip


def _forward(module: nn.Module, own: Callable | None, args: tuple, kwargs: dict):
    if not torch.compiler.is_dynamo_compiling():  # Dynamo has given up on it
        _ran_unfused()
    if own is not None:
        return own(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _ran_unfused() -> None:
    reason = (
        "Dynamo keeps no more graphs of it, see torch._dynamo.config.recompile_limit, or does not "
        "run here"
    )
    _running.block.patched.ran_unfused(_running.block, reason)


def _call_network(network: nn.Module, *args, **kwargs):
    if torch.compiler.is_dynamo_compiling():
        _warn_of_compile()
    return network._call_impl(*args, **kwargs)


def _warn_of_compile() -> None:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    compiler = InstructionTranslator.current_tx().output.compiler_fn
    if getattr(compiler, "compiler_fn", compiler) is not compile_backend:
        warnings.warn(
            "torch.compile of a patched model compiles its blocks as they were, without the ops. "
            f"Compile it with {COMPILE}, which has them",
            stacklevel=2,
        )


# Runs while Dynamo traces. The mark itself imports Dynamo, for seconds.
when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(_warn_of_compile))
