"""What every op keeps on every backend, whatever it computes, on its examples."""

import copy
import pickle
from functools import cache, partial
from importlib import import_module

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    assert_as_accurate,
    assert_compiles,
    assert_equal_results,
    assert_threads_change_nothing,
    is_float,
    raises,
    run,
    with_gaps,
)
from torch.func import jvp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lumina_kernels
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS

SIZES = Sizes(device=DEVICE)
# One graph must serve all. The dimensions of the first differ: torch.compile takes equal ones to be
# the same.
COMPILED = (
    Sizes(B=9, grid=(2, 4, 11), T=7, H=12, G=6, K=10, F=26, device=DEVICE),
    Sizes(B=2, grid=(3, 2, 3), T=5, H=4, G=2, K=10, F=40, device=DEVICE),
    Sizes(B=4, grid=(2, 3, 5), T=6, H=8, G=4, K=10, F=56, device=DEVICE),
)
CALLS = [
    pytest.param(op, name, backend, id=f"{op}-{name or 'plain'}-{backend}")
    for op in OPS
    for name in examples(op, SIZES)
    for backend in BACKENDS
]
every_call = pytest.mark.parametrize("op, name, backend", CALLS)
every_op = pytest.mark.parametrize(
    "op, name", [(op, name) for op in OPS for name in examples(op, SIZES)]
)


def forward(op):
    """The declaration of the op's forward kernel."""
    return getattr(import_module(f"lumina_kernels.ops.{op}"), f"{op}_fwd")


def arguments(op, name, sizes=SIZES, seed=0):
    torch.manual_seed(seed)
    return examples(op, sizes)[name]


def differentiated(op, backend):
    """The inputs whose gradients the backend computes."""
    without = op == "gqa_attention" and backend == "cuda"
    return frozenset() if without else forward(op).differentiable


def call(op, backend):
    """The op on a backend, results without a gradient where the backend has none."""
    fn = partial(getattr(lumina_kernels, op), backend=backend)
    return fn if differentiated(op, backend) else torch.no_grad()(fn)


def results(op, backend, inputs, fn=None):
    return run(fn or call(op, backend), inputs, wrt=differentiated(op, backend))


@cache
def expected(op, name, backend):
    """Outputs and gradients of the example. No NaN: memory that nothing wrote is NaN in tests."""
    found = results(op, backend, arguments(op, name))
    assert not any(value.isnan().any() for value in found.values())
    return found


@every_call
def test_results_do_not_change(op, name, backend):
    """The same bits again, and with one, two and three threads."""
    inputs = arguments(op, name)
    assert_equal_results(results(op, backend, inputs), expected(op, name, backend))
    if backend == "cpu":
        fn, wrt = call(op, backend), differentiated(op, backend)
        assert_threads_change_nothing(fn, inputs, wrt=wrt)


@every_call
def test_results_are_those_of_the_definition(op, name, backend):
    inputs = arguments(op, name)
    low = results(op, "torch", inputs)
    high = results(op, "torch", {n: x.double() if is_float(x) else x for n, x in inputs.items()})
    for key, value in expected(op, name, backend).items():
        assert value.dtype == low[key].dtype, key
        assert_as_accurate(key, value, low[key], high[key])


@every_call
def test_views_with_gaps(op, name, backend):
    strided = {n: with_gaps(x) if is_float(x) else x for n, x in arguments(op, name).items()}
    assert_equal_results(results(op, backend, strided), expected(op, name, backend))


@every_call
@pytest.mark.parametrize("empty", ({"B": 0}, {"grid": (1, 0, 3)}), ids=("batch", "tokens"))
def test_empty(op, name, backend, empty):
    """No samples, or no tokens: the definition's shapes, and sums over nothing are 0."""
    inputs = arguments(op, name, Sizes(device=DEVICE, **empty))
    found, want = results(op, backend, inputs), results(op, "torch", inputs)
    for key in found:
        assert torch.equal(found[key], want[key]), key


@every_call
def test_mixed_dtypes(op, name, backend):
    """Each tensor in turn in another dtype: accurate where the definition takes it, else the same
    error."""
    for changed, x in arguments(op, name).items():
        if not is_float(x):
            continue
        inputs = arguments(op, name) | {changed: x.half()}
        wide = {n: x.double() if is_float(x) else x for n, x in inputs.items()}
        try:
            low = results(op, "torch", inputs)
        except TypeError as error:
            raises(type(error), "must have the dtype", call(op, backend), inputs)
            continue
        high = results(op, "torch", wide)
        for key, value in results(op, backend, inputs).items():
            assert value.dtype == low[key].dtype, (changed, key)
            assert_as_accurate(f"{changed}: {key}", value, low[key], high[key])


@every_call
def test_float64_is_refused(op, name, backend):
    inputs = {n: x.double() if is_float(x) else x for n, x in arguments(op, name).items()}
    raises(TypeError, "takes no float64", call(op, backend), inputs)


@every_call
def test_registrations_pass_opcheck(op, name, backend):
    wrt = differentiated(op, backend)
    with _Calls(with_gradient=bool(wrt)) as calls:
        results(op, backend, arguments(op, name))
    assert len(calls.made) == (2 if wrt else 1)
    for overload, args in calls.made:
        torch.library.opcheck(overload, args)


@every_call
def test_one_graph_serves_all_sizes(op, name, backend):
    inputs = [arguments(op, name, sizes) for sizes in COMPILED]
    assert_compiles(call(op, backend), *inputs, wrt=differentiated(op, backend))


@every_call
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(op, name, backend, reentrant):
    if not differentiated(op, backend):
        return
    fn = call(op, backend)

    def checkpointed(**inputs):
        names = list(inputs)
        positional = lambda *values: fn(**dict(zip(names, values, strict=True)))  # noqa: E731
        return checkpoint(positional, *inputs.values(), use_reentrant=reentrant)

    found = results(op, backend, arguments(op, name), checkpointed)
    assert_equal_results(found, expected(op, name, backend))


@every_call
def test_forward_mode(op, name, backend):
    """Through a kernel an error, also where only the registered op is called."""
    fn, primals, tangents = _forward_mode(op, name, backend)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(fn, primals, tangents)
    with _Calls() as calls:
        fn(*primals)
    (overload, args), *_ = calls.made
    floats = [i for i, x in enumerate(args) if is_float(x)]

    def registered(x):
        return overload(*(x if i == floats[0] else y for i, y in enumerate(args)))

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(registered, (args[floats[0]].detach(),), (torch.ones_like(args[floats[0]]),))


@every_op
def test_forward_mode_takes_the_definition(op, name):
    tangents = {}
    for backend in (None, "torch"):
        fn, primals, directions = _forward_mode(op, name, backend)
        tangents[backend] = jvp(fn, primals, directions)[1]
    assert any(x.any() for x in tangents["torch"])
    for found, want in zip(tangents[None], tangents["torch"], strict=True):
        assert torch.equal(found, want)


@every_call
def test_copies_and_pickles(op, name, backend):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.op, self.kernel = (
                partial(getattr(lumina_kernels, op), backend=backend),
                forward(op),
            )

    holder = Holder()
    twin = copy.deepcopy(holder)
    assert twin.kernel is holder.kernel is pickle.loads(pickle.dumps(holder.kernel))
    for other in (twin.op, pickle.loads(pickle.dumps(holder.op))):
        found = results(op, backend, arguments(op, name), other if differentiated(op, backend)
                        else torch.no_grad()(other))  # fmt: skip
        assert_equal_results(found, expected(op, name, backend))


@every_call
def test_a_gradient_of_a_gradient_is_refused(op, name, backend):
    wrt = differentiated(op, backend)
    if not wrt:
        return
    inputs = arguments(op, name)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if n in wrt and is_float(x)}
    outs = call(op, backend)(**inputs | leaves)
    outs = [x for x in (outs if isinstance(outs, tuple) else (outs,)) if x is not None]
    total = sum(x.square().sum() for x in outs if x.requires_grad)
    first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match="has no gradient, backend='torch' has"):
        sum(x.sum() for x in first).backward()


@every_call
def test_flops_are_those_of_the_definition(op, name, backend):
    """Forward and backward, as torch.utils.flop_counter counts them."""
    counts = {}
    for each in (backend, "torch"):
        wrt = differentiated(op, backend)
        fn = partial(getattr(lumina_kernels, op), backend=each)
        with FlopCounterMode(display=False) as counter:
            run(fn if wrt else torch.no_grad()(fn), arguments(op, name), wrt=wrt)
        counts[each] = counter.get_total_flops()
    assert counts[backend] == counts["torch"]
    assert (counts["torch"] > 0) == (op == "gqa_attention")


class _Calls(TorchDispatchMode):
    """Records the calls of this package's ops, those of forwards with leaves as inputs."""

    def __init__(self, with_gradient=True):
        super().__init__()
        self.made, self.with_gradient = [], with_gradient

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lumina_kernels":
            grads = self.with_gradient and "_fwd" in func.name()
            leaf = lambda x: x.detach().clone().requires_grad_(grads) if is_float(x) else x  # noqa: E731
            self.made.append((func, [leaf(x) for x in args]))
        return func(*args, **(kwargs or {}))


def _forward_mode(op, name, backend):
    """The op as a function of its differentiable inputs, these, and their tangents."""
    inputs = arguments(op, name)
    wrt = forward(op).differentiable or {"x", "v"}
    primals = {n: x for n, x in inputs.items() if n in wrt and is_float(x)}

    def fn(*values):
        outs = getattr(lumina_kernels, op)(**inputs | dict(zip(primals, values, strict=True)),
                                           backend=backend)  # fmt: skip
        outs = outs if isinstance(outs, tuple) else (outs,)
        return tuple(x for x in outs if x is not None and x.is_floating_point())

    return fn, tuple(primals.values()), tuple(torch.randn_like(x) for x in primals.values())
