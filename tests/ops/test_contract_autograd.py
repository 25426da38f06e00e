"""Derivatives of every op on every backend, on its examples."""

import pytest
import torch
from common import (
    assert_equal_results,
    is_float,
    raises,
    run,
)
from contract import (
    Calls,
    arguments,
    call,
    every_call,
    every_op,
    every_registration,
    expected,
    forward,
    results,
)
from torch.func import jvp
from torch.utils.checkpoint import checkpoint


@every_call
def test_one_output_at_a_time(op, name, backend):
    """The gradients through the outputs one by one add up to the gradients through all."""
    inputs, wrt = arguments(op, name), forward(op).differentiable
    whole = {key: x for key, x in expected(op, name, backend).items() if key[0] == "d"}
    outputs = [int(k[4:]) for k, x in expected(op, name, backend).items() if k[0] == "o"]
    if not wrt or len(outputs) == 1:
        return

    def only(i):
        def fn(**inputs):
            outs = call(op, backend)(**inputs)
            return tuple(x if j == i or x is None else x.detach() for j, x in enumerate(outs))

        return run(fn, inputs, wrt)

    parts = [
        only(i) for i in outputs if expected(op, name, backend)[f"out {i}"].is_floating_point()
    ]
    for key, x in whole.items():
        total = sum(part[key] for part in parts if key in part)
        torch.testing.assert_close(total, x, rtol=1e-5, atol=1e-5, msg=key)


@every_registration
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(op, name, backend, reentrant):
    if not forward(op).differentiable:
        return
    fn = call(op, backend)

    def checkpointed(**inputs):
        def positional(*values):
            return fn(**dict(zip(inputs, values, strict=True)))

        return checkpoint(positional, *inputs.values(), use_reentrant=reentrant)

    found = results(op, backend, arguments(op, name), checkpointed)
    assert_equal_results(found, expected(op, name, backend))


@every_registration
def test_forward_mode(op, name, backend):
    """Through a kernel an error, also where only the registered op is called."""
    fn, primals, tangents = _forward_mode(op, name, backend)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(fn, primals, tangents)
    with Calls() as calls:
        fn(*primals)
    (overload, args), *_ = calls.made
    floats = [i for i, x in enumerate(args) if is_float(x)]

    def registered(x):
        return overload(*(x if i == floats[0] else y for i, y in enumerate(args)))

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(registered, (args[floats[0]].detach(),), (torch.ones_like(args[floats[0]]),))


@every_op
def test_forward_mode_takes_the_definition(op, name):
    """Along all inputs together, and along each of them alone."""
    for only in (None, *_primals(op, name)):
        tangents = {}
        for backend in (None, "torch"):
            torch.manual_seed(0)
            fn, primals, directions = _forward_mode(op, name, backend, only)
            tangents[backend] = jvp(fn, primals, directions)[1]
        assert any(x.any() for x in tangents["torch"]), only
        for found, want in zip(tangents[None], tangents["torch"], strict=True):
            assert torch.equal(found, want), only


@every_registration
def test_a_gradient_of_a_gradient_is_refused(op, name, backend):
    wrt = forward(op).differentiable
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


def _primals(op, name):
    """The inputs that have derivatives."""
    wrt = forward(op).differentiable or {"x", "v"}
    return {n: x for n, x in arguments(op, name).items() if n in wrt and is_float(x)}


def _forward_mode(op, name, backend, only=None):
    """The op as a function of its differentiable inputs or of one, these, and their tangents."""
    inputs, primals = arguments(op, name), _primals(op, name)
    primals = primals if only is None else {only: primals[only]}

    def fn(*values):
        outs = call(op, backend)(**inputs | dict(zip(primals, values, strict=True)))
        outs = outs if isinstance(outs, tuple) else (outs,)
        return tuple(x for x in outs if x is not None and x.is_floating_point())

    return fn, tuple(primals.values()), tuple(torch.randn_like(x) for x in primals.values())


@every_call
def test_gradients_that_a_kernel_does_not_have(op, name, backend):
    """Refused by name where a kernel was asked for; without one the definition computes them."""
    inputs = arguments(op, name)
    constants = {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    constants |= {n: x.float() for n, x in constants.items() if n == "positions"}
    for key, x in constants.items():
        if not is_float(x) or key in forward(op).differentiable:
            continue
        learned = inputs | {key: x.clone().requires_grad_()}
        match = f"no gradient of {key}|no gradients, which"
        raises(NotImplementedError, match, call(op, backend), learned)
        with torch.no_grad():
            outs = call(op, backend)(**learned)
        out = outs[0] if isinstance(outs, tuple) else outs
        assert torch.equal(out, expected(op, name, backend)["out 0"])
        found, want = (run(call(op, default), learned, {key}) for default in (None, "torch"))
        if key in forward(op).differentiable:
            continue  # another kernel has it
        assert_equal_results(found, want)
