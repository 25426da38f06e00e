"""The ways into the graph pass: `patch`, `unpatch` and the Dynamo backend."""

import copy
import itertools
import types
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from lumina_kernels.backend import BEST_FIRST, DEVICES, resolve
from lumina_kernels.patch_report import Captured, Report, Site
from lumina_kernels.when_imported import when_imported

COMPILE = 'torch.compile(model, backend="lumina_kernels")'


def patch(
    model, *, backend: str | None = None, exact: bool = False, verify: bool = False
) -> Report:
    """Have the repeated blocks of a diffusion transformer run on the fused ops, in place.

    Every element of the model's lists of modules is captured when it first runs; its norms,
    rotations, attentions, gates and activations are replaced by ops of this package where these
    compute the same, and the rewritten graph runs from then on, without a compiler. What does not
    match stays as it is. State dict, class names and hooks are untouched, and so are parameters,
    but for one case: where two attentions of a block have equal query projections (Lumina-Next) and
    the model is not in training mode, they share them until `unpatch`, which has to come before
    `save_pretrained` (safetensors refuses what is shared). Copies and pickles of the model are
    unpatched. A second call returns the same report. A model that is compiled as a whole has
    `compile_backend` instead.

    Args:
        model: an nn.Module, or a pipeline, whose components named transformer... are patched.
        backend: of the ops, for every one that is replaced; see `lumina_kernels.backend`.
        exact: replace only what the model rounds once, so that 16-bit results of every replaced
            part stay what they were but for single last bits: LayerNorm and torch's RMSNorm by
            themselves, rotations, activations, chains in float32.
        verify: compare each block with the original in its first forward, which needs no gradient.

    Returns:
        a `Report`, which fills as the blocks run.

    Raises:
        ValueError: the model has no repeated blocks, is compiled, or is patched in another way.
        ArithmeticError: in a forward, with verify=True: a block is not as accurate as it was. In
            float32 max|difference| / rms must be at most 2e-5; in 16 bits the error against the
            block in float32 at most 1.15 times the original's.
    """
    networks, way = _networks(model), (backend, exact, verify)
    patches = {prefix: _patch_of(network) for prefix, network in networks.items()}
    report = next((patched.report for patched in patches.values() if patched), Report())
    if any(patched and patched.way != way for patched in patches.values()):
        raise ValueError("the model is patched with other options: call unpatch first")
    if backend is not None:
        # Where the model will run: the weights of an offloaded one are on "cpu" or "meta".
        is_gpu = torch.cuda.is_available() and DEVICES.get(backend) == "cuda"
        resolve(backend, BEST_FIRST, torch.empty(0, device="cuda" if is_gpu else "cpu"))
    for prefix, network in networks.items():
        if not patches[prefix]:
            if any(module._compiled_call_impl for module in network.modules()):
                raise ValueError(f"the model is compiled: patch it before, or use {COMPILE}")
            _Patch(network, prefix, way, report)
    return report


def unpatch(model) -> None:
    """Undo `patch`; nothing happens to a model that is not patched."""
    for network in _networks(model).values():
        if patched := _patch_of(network):
            for module in network.modules():
                if getattr(module._compiled_call_impl, "patched", None) is patched:
                    module._compiled_call_impl = None
            for module, name, own in patched.shared:
                with torch.no_grad():
                    own.copy_(getattr(module, name))
                setattr(module, name, own)


def _patch_of(network: nn.Module) -> "_Patch | None":
    """What a model is patched by. Only its modules hold it: nothing outlives the model."""
    entries = (module._compiled_call_impl for module in network.modules())
    return next((entry.patched for entry in entries if hasattr(entry, "patched")), None)


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
    for network in found.values():
        if hasattr(network, "_orig_mod"):
            raise ValueError(f"the model is compiled: patch it before, or use {COMPILE}")
        if not repeated_blocks(network):
            raise ValueError(f"{type(network).__name__} has no lists of blocks to patch")
    return found


def _fused(gm: GraphModule, *options) -> tuple[GraphModule, Captured]:
    """The graph on the ops, or as it was where that fails: an upstream that changes costs speed."""
    from lumina_kernels.dropin.capture import capture
    from lumina_kernels.dropin.fuse import fuse

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
        self.way, self.report, self.current = way, report, ""
        self.functions, blocks = {}, repeated_blocks(network)
        self.shared = []  # an optimizer has the parameters of a model that is trained
        for block in blocks.values() if not network.training else ():
            self.shared += _share_equal(block)
        report.blocks += [prefix + path for path in blocks]
        for path, block in blocks.items():
            self._enter(block, self._entry(prefix + path, block))
        self._enter(network, partial(_call_network, network))

    def _enter(self, module: nn.Module, entry: Callable) -> None:
        entry.patched, module._compiled_call_impl = self, entry

    def _entry(self, path: str, block: nn.Module) -> Callable:
        kind = type(block)
        if kind not in self.functions:
            # One function for the blocks of a class, with code of its own: Dynamo counts the graphs
            # of a piece of code, and gives up after eight, whoever runs it.
            own = types.FunctionType(_call_block.__code__.replace(co_name=kind.__name__), globals())
            self.functions[kind] = torch.compile(own, backend=self._rewrite)
        compiled, is_new = self.functions[kind], True

        def run(*args, **kwargs):
            self.current = path
            return compiled(self, block, args, kwargs)

        def verified(*args, **kwargs):
            nonlocal is_new
            if is_new:
                _verify(path, block, run, args, kwargs)
                is_new = False
            return run(*args, **kwargs)

        return verified if self.way[2] else run

    def _rewrite(self, gm: GraphModule, inputs: list) -> Callable:
        fused, captured = _fused(gm, *self.way[:2])
        self.report.graphs.append(captured)

        def counted(*args):
            captured.calls[self.current] += 1
            return fused.forward(*args)

        return counted

    def ran_unfused(self, block: nn.Module) -> None:
        if not self.report.unfused:
            kind = type(block).__name__
            warnings.warn(
                f"{kind} runs unfused: Dynamo keeps no more graphs of it, see "
                "torch._dynamo.config.recompile_limit, or does not run here",
                stacklevel=5,
            )
        self.report.unfused[self.current] += 1


def _call_block(patched: _Patch, block: nn.Module, args: tuple, kwargs: dict):
    if not torch.compiler.is_compiling():  # Dynamo has given up on it
        patched.ran_unfused(block)
    return block._call_impl(*args, **kwargs)


def _call_network(network: nn.Module, *args, **kwargs):
    if torch.compiler.is_compiling():
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


def _verify(path: str, block: nn.Module, run: Callable, args: tuple, kwargs: dict) -> None:
    """Raise if `run` is less accurate than the block's own forward."""

    def outputs(of, dtype=None):
        a, k = tree_map(lambda x: _copied(x, dtype), (args, kwargs))
        return [x.double() for x in tree_leaves(of(*a, **k)) if isinstance(x, Tensor)]

    if any("forward" in vars(module) for module in block.modules()):
        raise ValueError("verify=True needs blocks without hooks: add them after the first forward")
    device = next((x.device.type for x in block.parameters()), "cpu")
    narrow = any(p.is_floating_point() and p.itemsize < 4 for p in block.parameters())
    narrow = narrow or torch.is_autocast_enabled(device)
    with torch.no_grad():
        own, got = outputs(block._call_impl), outputs(run)
        with torch.autocast(device, enabled=False):
            truth = outputs(copy.deepcopy(block).float(), torch.float32) if narrow else own
    for before, after, exact in zip(own, got, truth, strict=True):
        rms, error = exact.square().mean().sqrt(), (after - exact).abs().max()
        allowed = 2e-5 * rms
        if narrow:
            error, was = ((x - exact).square().mean().sqrt() for x in (after, before))
            allowed = allowed + 1.15 * was
        if not error <= allowed:
            raise ArithmeticError(f"{path}: error {error:.2e} where {allowed:.2e} is allowed")


def _copied(x, dtype: torch.dtype | None):
    if not isinstance(x, Tensor):
        return x
    return x.to(dtype, copy=True) if dtype and x.is_floating_point() else x.clone()


def _share_equal(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Let two sublayers with an equal projection have the same parameters there, and in what else
    they share by name: two attentions of one query, say, which is then computed once. Returns what
    was replaced."""
    replaced = []
    sublayers = [dict(layer.named_children()) for layer in block.children()]
    for first, second in itertools.combinations(sublayers, 2):
        equal = [(first[n], second[n]) for n in first if _is_equal(first[n], second.get(n))]
        if not any(p.ndim > 1 and p.min() < p.max() for one, _ in equal for p in one.parameters()):
            continue  # vectors of ones are equal by chance
        for one, other in equal:
            for name, own in list(other.named_parameters(recurse=False)):
                replaced.append((other, name, own))
                setattr(other, name, getattr(one, name))
    return replaced


def _is_equal(one: nn.Module, other: nn.Module | None) -> bool:
    """Whether two layers have parameters of their own, all equal."""
    a, b = (dict(m.named_parameters(recurse=False)) if m else {} for m in (one, other))
    return type(one) is type(other) and bool(a) and a.keys() == b.keys() and all(
        x.shape == b[n].shape and x.dtype == b[n].dtype and x.device == b[n].device
        and not x.is_meta and x is not b[n] and torch.equal(x, b[n])
        for n, x in a.items()
    )  # fmt: skip
