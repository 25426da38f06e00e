"""One declaration per kernel: its annotated signature is the schema, its body the fake."""

import inspect
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from types import UnionType
from typing import Annotated, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _has_storage,
    _has_torch_function,
    _len_torch_dispatch_stack,
)
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from lumina_kernels import backend, sharding
from lumina_kernels.when_imported import when_imported

# Kept for the life of the process: a library that is freed takes its ops with it.
_PUBLIC = torch.library.Library("lumina_kernels", "FRAGMENT")
_NATIVE = torch.library.Library("lumina_kernels_cpp", "FRAGMENT")
_PRE_DISPATCH = DispatchKey.PreDispatch


def kernel_op(outputs: str, over: str = "") -> Callable[[Callable], "KernelOp"]:
    """Declare the forward kernel of an op.

        Rows = Annotated[Tensor, "B L D"]

        @kernel_op("out", over="B L")
        def scale_fwd(x: Rows, weight: Annotated[Tensor, "D"]) -> Rows:
            return x.new_empty(x.shape)

        @scale_fwd.backward("dx dweight")
        def scale_bwd(dout, x, weight):
            return like(x, weight)

    Args:
        outputs: names of the results, separated by spaces.
        over: dimensions along which DTensor may split the op, by the letters of the annotations.
    """

    def declare(fake: Callable) -> KernelOp:
        hints = get_type_hints(fake, include_extras=True)
        result = hints.pop("return")
        results = get_args(result) if get_origin(result) is tuple else (result,)
        return KernelOp(fake, hints, dict(zip(outputs.split(), results, strict=True)), over)

    return declare


def like(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Contiguous results, without values, with the shapes and dtypes of `tensors`."""
    return tuple(None if x is None else x.new_empty(x.shape) for x in tensors)


class KernelOp:
    """`lumina_kernels::<name>`, the op that autograd, torch.compile and DTensor see.

    Its last argument is the name of the backend, whose function of the same name it runs.
    `lumina_kernels_cpp::<name>`, the same op without that argument, is what C++ and CUDA implement
    (`m.impl`). Both get the schema and the fake from here.

    An op returns no None: a result that is absent, as a fake or a Triton launcher may return it, is
    an empty float32 tensor. Made by `kernel_op` and `KernelOp.backward`.
    """

    def __init__(self, fake: Callable, inputs: dict, outputs: dict, over: str):
        assert not inputs.keys() & outputs.keys(), "a result is named as an input"
        self.name, self.inputs, self.outputs, self.over = fake.__name__, inputs, outputs, over
        self._fake, self._gradient = fake, None
        self.takes_needs = any(name.startswith("needs_") for name in inputs)
        self.__module__ = fake.__module__
        self._silent = {type(None), str, *map(_bare_type, inputs.values())} - {Tensor}
        self._op_file = fake.__module__.rpartition(".")[2]
        arguments, results = _schema(inputs, outputs)
        self.schema = f"{self.name}({arguments}) -> {results}"
        _NATIVE.define(self.schema)
        _NATIVE._register_fake(self.name, self.fake)
        tag = torch.Tag.pt2_compliant_tag
        _PUBLIC.define(f"{self.name}({arguments}, str backend) -> {results}", tags=(tag,))
        _PUBLIC.impl(self.name, self._run, "CompositeExplicitAutograd")
        _PUBLIC._register_fake(self.name, lambda *args: self.fake(*args[:-1]))
        self.overload = getattr(torch.ops.lumina_kernels, self.name).default
        # As torch.library.register_autograd does, which would drop tangents without a word.
        self._reverse_mode = make_autograd_impl(self.overload, Info(self._backward, self._keep))
        _PUBLIC.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        self._record = {unseen: _recorder(self, unseen) for unseen in (False, True)}
        when_imported("torch.distributed.tensor", partial(sharding.declare, self))

    def __call__(self, *args):
        unseen = self._is_unseen(args)
        if unseen is None:
            return self.overload(*args)
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return self._record[unseen](*args)
        return self._below_autograd(args, unseen)

    def __reduce__(self):
        return self.name  # as a function: copies and pickles are the op itself

    @property
    def differentiable(self) -> frozenset[str]:
        """Names of the inputs that have a gradient."""
        if self._gradient is None:
            return frozenset()
        return frozenset((*(name[1:] for name in self._gradient.outputs), *self._same))

    def fake(self, *args):
        """Results without values."""
        return _without_none(self._fake(*args), args[0])

    def _below_autograd(self, args: tuple, unseen: bool):
        """What autograd would call, sooner; without a dispatch if nothing sees it."""
        if unseen and args[-1] == "triton":
            return self._run(*args)
        with _AutoDispatchBelowAutograd():
            return self._run(*args) if unseen else self.overload(*args)

    def _is_unseen(self, args: tuple) -> bool | None:
        """Whether no tensor and no profiler looks for the op, and the arguments are what a dispatch
        makes of them; None where a compiler, a mode, a transform or a tracer looks at the call."""
        # One loop and names of this module: to find an object that is not cached takes longest.
        if (
            is_dynamo_compiling()
            or _len_torch_dispatch_stack()
            or _are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or _has_torch_function(args)
            or _get_tracing_state()
            or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        ):
            return None
        unseen, silent = not _profiler_enabled(), self._silent
        for x in args:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                # Wrappers of old and dead transforms have no memory of their own.
                if not _has_storage(x):
                    return None
                # The dispatcher computes -x for the kernel, or gives zeros memory.
                if x.is_neg() or x._is_zerotensor():
                    unseen = False
            elif kind not in silent:
                if isinstance(x, Tensor) and not _has_storage(x):
                    return None
                if not (kind is list and {*map(type, x)} == {int}):
                    unseen = False
        return unseen

    def _run(self, *args):
        *inputs, name = args
        launch = getattr(backend.launchers(self._op_file, name), self.name)
        first = inputs[0]
        # Triton launches on the current GPU, and launchers read that one's properties.
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return _without_none(launch(*inputs), first)
        return _without_none(launch(*inputs), first)

    def _autograd(self, keyset, *args):
        if backend.any_tangent(args):
            raise NotImplementedError(
                f"{self.name} has no forward-mode derivative, backend='torch' has"
            )
        return self._reverse_mode(keyset, *args)

    def backward(self, outputs: str, **same: str) -> Callable[[Callable], "KernelOp"]:
        """Declare the kernel that computes the gradients of this op, which makes it differentiable.

        The parameters of the decorated fake say by name what the kernel needs, with the types they
        have in the forward: inputs and results of the forward, which are kept for it, `d<result>`
        for the gradient of a result (None where an optional one is absent), `needs_<input>` for
        whether that input needs a gradient. A result whose gradient the kernel does not take is not
        differentiable.

        Args:
            outputs: names of the results, `d<input>`.
            same: input -> name of the parameter that is its gradient as it is.
        """
        known = self.inputs | self.outputs
        gradients = {f"d{name}": hint for name, hint in known.items()}
        assert not known.keys() & gradients.keys(), "a name is that of another's gradient"
        known |= gradients
        known |= {f"needs_{name}": bool for name in self.inputs}

        def declare(fake: Callable) -> KernelOp:
            inputs = {name: known[name] for name in inspect.signature(fake).parameters}
            results = {name: known[name] for name in outputs.split()}
            self._gradient = KernelOp(fake, inputs, results, self.over)
            self._same = same
            values = (*self.inputs, "backend", *self.outputs)
            constants = {name for name, hint in self.inputs.items() if not _is_tensor(hint)}
            constants.add("backend")
            kept = [name for name in values if name in (*inputs, "backend")]
            self._constants = [name for name in kept if name in constants]
            self._tensors = [name for name in kept if name not in constants]
            self._constants_of, self._tensors_of = (
                _items(values.index(name) for name in names)
                for names in (self._constants, self._tensors)
            )
            self._fixed = _items(
                i for i, name in enumerate(self.outputs) if f"d{name}" not in inputs
            )
            self._optional = [
                (i, name) for i, (name, hint) in enumerate(self.inputs.items())
                if _is_optional(hint) and f"d{name}" in (*results, *(f"d{z}" for z in same))
            ]  # fmt: skip
            self._optional_outputs = [
                (i, name) for i, (name, hint) in enumerate(self.outputs.items())
                if _is_optional(hint)
            ]  # fmt: skip
            return self._gradient

        return declare

    def _keep(self, ctx, inputs, output):
        """Save what the backward needs."""
        if self._gradient is None:
            return
        outputs = output if isinstance(output, tuple) else (output,)
        values = (*inputs, *outputs)
        if fixed := self._fixed(outputs):
            ctx.mark_non_differentiable(*fixed)
        ctx.save_for_backward(*self._tensors_of(values))
        ctx.constants = self._constants_of(values)
        ctx.absent = [name for i, name in self._optional if inputs[i] is None]
        if self._optional_outputs:
            shapes = [(name, outputs[i].shape) for i, name in self._optional_outputs]
            ctx.absent += [name for name, shape in shapes if shape == _ABSENT]

    def _backward(self, ctx, *douts):
        if self._gradient is None:
            raise NotImplementedError(f"{self.name} has no gradient, backend='torch' has")
        # Read once: checkpointing refuses, or computes, a second time.
        values = dict(zip(self._tensors, ctx.saved_tensors, strict=True))
        values.update(zip(self._constants, ctx.constants, strict=True))
        for name, dout in zip(self.outputs, douts, strict=True):
            values[f"d{name}"] = None if name in ctx.absent else dout
        op = self._gradient
        if op.takes_needs:
            asked = zip(self.inputs, ctx.needs_input_grad, strict=False)
            values |= {f"needs_{name}": needed for name, needed in asked}
        results = op(*[values[name] for name in op.inputs], values["backend"])
        results = results if isinstance(results, tuple) else (results,)
        grads = dict(zip(op.outputs, results, strict=True))
        grads |= {f"d{name}": values[source] for name, source in self._same.items()}
        absent = ctx.absent
        return (*[None if z in absent else grads.get(f"d{z}") for z in self.inputs], None)

    def flops(self, formula: Callable) -> Callable:
        """Decorate the FLOP formula of this op for `torch.utils.flop_counter`: a function of the
        input shapes, as `register_flop_formula` takes it."""

        def register():
            from torch.utils.flop_counter import register_flop_formula

            register_flop_formula(self.overload.overloadpacket)(formula)

        when_imported("torch.utils.flop_counter", register)
        return formula


_ABSENT = (0,)


def _recorder(op: KernelOp, unseen: bool) -> Callable:
    """Calls `op` and has autograd record that, where it is known that it must.

    The same as what `make_autograd_impl` makes, without a dispatch and without what
    `torch.autograd.Function.apply` does for transforms of functions."""

    def forward(ctx, *args):
        results = op._below_autograd(args, unseen)
        op._keep(ctx, args, results)
        return results

    def backward(ctx, *douts):
        return op._backward(ctx, *douts)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    Recorded = type(f"{op.name}_backward", (torch.autograd.Function,), members)
    return super(torch.autograd.Function, Recorded).apply


def _without_none(results, first: Tensor):
    if isinstance(results, Tensor):
        return results
    for x in results:
        if x is None:
            break
    else:
        return results
    return tuple(
        [first.new_empty(_ABSENT, dtype=torch.float32) if x is None else x for x in results]
    )


def _items(indices) -> Callable[[tuple], tuple]:
    """A function that takes these items of a tuple."""
    indices = tuple(indices)
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple([values[i] for i in indices])


def _schema(inputs: dict, outputs: dict) -> tuple[str, str]:
    """The arguments and the results of an op, in the schema language of PyTorch."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(name, kind, annotation=_bare_type(hint)) for name, hint in inputs.items()
    ]
    results = tuple(Tensor for _ in outputs)

    def prototype():
        pass

    prototype.__signature__ = inspect.Signature(
        parameters,
        return_annotation=Tensor if len(results) == 1 else tuple[results],
    )
    arguments, results = torch.library.infer_schema(prototype, mutates_args=()).split(" -> ")
    return arguments[1:-1], results


def _is_tensor(hint) -> bool:
    return Tensor in (_bare_type(hint), *get_args(_bare_type(hint)))


def _is_optional(hint) -> bool:
    return get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint)


def _bare_type(hint):
    """The type without the letters of its dimensions."""
    if _is_optional(hint):
        return _bare_type(next(x for x in get_args(hint) if x is not type(None))) | None
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint
