"""One declaration per kernel: its annotated signature is the schema, its body the fake."""

import inspect
from collections.abc import Callable
from functools import partial
from types import UnionType
from typing import Annotated, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl

from lumina_kernels import backend, sharding
from lumina_kernels.when_imported import when_imported

# Kept for the life of the process: a library that is freed takes its ops with it.
_PUBLIC = torch.library.Library("lumina_kernels", "FRAGMENT")
_NATIVE = torch.library.Library("lumina_kernels_cpp", "FRAGMENT")


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
        when_imported("torch.distributed.tensor", partial(sharding.declare, self))

    def __call__(self, *args):
        if torch.is_grad_enabled() or not _is_plain_call():
            return self.overload(*args)
        with torch._C._AutoDispatchBelowAutograd():  # what autograd itself would do, sooner
            return self.overload(*args)

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
            self._kept = [i for i, name in enumerate(values) if name in (*inputs, "backend")]
            self._fixed = [i for i, name in enumerate(self.outputs) if f"d{name}" not in inputs]
            self._kept_names = [values[i] for i in self._kept]
            return self._gradient

        return declare

    def _keep(self, ctx, inputs, output):
        """Save what the backward needs."""
        if self._gradient is None:
            return
        outputs = output if isinstance(output, tuple) else (output,)
        values = (*inputs, *outputs)
        kept = [values[i] for i in self._kept]
        ctx.mark_non_differentiable(*[outputs[i] for i in self._fixed])
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in kept])
        ctx.constants = [None if isinstance(x, Tensor) else x for x in kept]
        ctx.is_absent = [x is None for x in inputs]
        ctx.outputs_absent = [x.shape == _ABSENT for x in outputs]

    def _backward(self, ctx, *douts):
        if self._gradient is None:
            raise NotImplementedError(f"{self.name} has no gradient, backend='torch' has")
        saved = ctx.saved_tensors  # read once: checkpointing refuses, or computes, a second time
        kept = [c if x is None else x for x, c in zip(saved, ctx.constants, strict=True)]
        values = dict(zip(self._kept_names, kept, strict=True))
        for name, dout, absent in zip(self.outputs, douts, ctx.outputs_absent, strict=True):
            optional = absent and _is_optional(self.outputs[name])
            values[f"d{name}"] = None if optional else dout
        op = self._gradient
        if op.takes_needs:
            asked = zip(self.inputs, ctx.needs_input_grad, strict=False)
            values |= {f"needs_{name}": needed for name, needed in asked}
        results = op(*[values[name] for name in op.inputs], values["backend"])
        results = results if isinstance(results, tuple) else (results,)
        grads = dict(zip(op.outputs, results, strict=True))
        grads |= {f"d{name}": values[source] for name, source in self._same.items()}
        names = zip((*self.inputs, "backend"), ctx.is_absent, strict=True)
        return tuple([None if absent else grads.get(f"d{name}") for name, absent in names])

    def flops(self, formula: Callable) -> Callable:
        """Decorate the FLOP formula of this op for `torch.utils.flop_counter`: a function of the
        input shapes, as `register_flop_formula` takes it."""

        def register():
            from torch.utils.flop_counter import register_flop_formula

            register_flop_formula(self.overload.overloadpacket)(formula)

        when_imported("torch.utils.flop_counter", register)
        return formula


_ABSENT = (0,)


def _is_plain_call() -> bool:
    """Whether nothing looks at a call but autograd: no compiler, no transform of functions."""
    return not (
        torch.compiler.is_dynamo_compiling()
        or backend.in_forward_mode()
        or torch._C._functorch.peek_interpreter_stack()
    )


def _without_none(results, first: Tensor):
    if isinstance(results, Tensor):
        return results
    return tuple(
        [first.new_empty(_ABSENT, dtype=torch.float32) if x is None else x for x in results]
    )


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


def _is_optional(hint) -> bool:
    return get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint)


def _bare_type(hint):
    """The type without the letters of its dimensions."""
    if _is_optional(hint):
        return _bare_type(next(x for x in get_args(hint) if x is not type(None))) | None
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint
