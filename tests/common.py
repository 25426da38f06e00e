"""What tests of the ops share: backends, the accuracy rule, gradients, the compile check."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch

from lumina_kernels.backend import MISSING

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Kernels that can run here: on a CPU Triton's run in its interpreter and CUDA's on the host.
BACKENDS = tuple(
    name
    for name in (("triton", "cuda") if DEVICE == "cuda" else ("triton", "cpu", "cuda"))
    if name not in MISSING or (name == "cuda" and DEVICE == "cpu" and shutil.which("g++"))
)
NATIVE = tuple(name for name in BACKENDS if name != "triton")
# Triton's interpreter cuts float32 off to bfloat16 instead of rounding it: on a CPU float16 stands
# in for it.
KERNEL_DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[:2]
KERNELS = [
    (name, dtype) for name in BACKENDS for dtype in (KERNEL_DTYPES if name == "triton" else DTYPES)
]
# Instruction sets of this processor that the C++ kernels have code for.
CPU_LEVELS = () if "cpu" in MISSING else tuple(import_module("lumina_kernels._C").cpu_levels())
# Those that the tests of the ops, whose tensors are on DEVICE, can run.
OP_LEVELS = CPU_LEVELS if "cpu" in BACKENDS else ()
# All that must be accurate: the definition, the kernels, and "cpu" once more with every instruction
# set but the best one.
IMPLEMENTATIONS = [
    *(("torch", dtype) for dtype in DTYPES),
    *KERNELS,
    *(
        pytest.param("cpu", dtype, id=f"{level}-{dtype}", marks=pytest.mark.cpu_level(level))
        for level in OP_LEVELS[:-1]
        for dtype in DTYPES
    ),
]

# Of GPUs that the test makes up, on which fake tensors are placed.
without_gpus = pytest.mark.skipif(torch.cuda.is_available(), reason="there are real GPUs")
needs_kernels = pytest.mark.skipif("cpu" in MISSING, reason="the C++ kernels are not built")


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def assert_as_accurate(name, out, low, high):
    """`out` errs at most twice as much as eager PyTorch in the same dtype (`low`), both against
    float64 (`high`), plus a few float32 roundings. Checked for the maximum and for the RMS."""
    assert out.shape == low.shape == high.shape, (name, out.shape, low.shape, high.shape)
    if high.numel() == 0:
        return
    out, low, high = out.double(), low.double(), high.double()
    for measure, norm in (("max", _max), ("rms", _rms)):
        error = norm(out - high)
        budget = 2 * norm(low - high) + 8 * torch.finfo(torch.float32).eps * norm(high)
        assert error <= budget, f"{name}: {measure} error {error:.3g}, allowed {budget:.3g}"


def run(fn, inputs, wrt=None):
    """Outputs of fn(**inputs) and, for fixed gradients of these, the gradients of its floating
    inputs, or of those named by `wrt`."""
    leaves = {
        name: value.detach().requires_grad_() if _is_leaf(name, value, wrt) else value
        for name, value in inputs.items()
    }
    outs = fn(**leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    results = {f"out {i}": out.detach() for i, out in enumerate(outs) if out is not None}
    differentiable = [out for out in outs if out is not None and out.requires_grad]
    # Whole eighths are the same number in every dtype.
    douts = [torch.arange(out.numel()).mul(7).remainder(17).sub(8).div(8) for out in differentiable]
    douts = [dout.view(out.shape).to(out) for dout, out in zip(douts, differentiable, strict=True)]
    floats = {name: leaf for name, leaf in leaves.items() if _is_leaf(name, leaf, wrt)}
    if not differentiable:
        return results
    torch.autograd.backward(differentiable, douts)
    grads = {name: leaf.grad for name, leaf in floats.items()}
    zeros = {name: torch.zeros_like(floats[name]) for name in grads if grads[name] is None}
    return results | {f"d{name}": grad for name, grad in (grads | zeros).items()}


def _is_leaf(name, value, wrt):
    return is_float(value) and (wrt is None or name in wrt)


def assert_same_in_float64(fn, independent, inputs):
    """Two formulations agree in float64, in outputs and in gradients."""
    expected = run(independent, inputs)
    for name, value in run(fn, inputs).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-10, atol=1e-11, msg=lambda text, name=name: name + text
        )


def cast(inputs, dtype=torch.float32):
    """The floating tensors among `inputs` in `dtype`."""
    return {name: x.to(dtype) if is_float(x) else x for name, x in inputs.items()}


def assert_accurate(fn, eager, inputs, dtype, wrt=None):
    """`fn` keeps the accuracy rule in `dtype` on the float64 `inputs`, gradients included."""
    rounded = cast(inputs, dtype)
    out, low = run(fn, rounded, wrt), run(eager, rounded, wrt)
    high = run(eager, cast(rounded, torch.float64), wrt)
    for name in high:
        assert_as_accurate(name, out[name], low[name], high[name])
        assert out[name].dtype == low[name].dtype, (name, out[name].dtype)


def assert_rounded_once(out, exact):
    """`out` is the nearest number of its dtype to `exact`, apart from rare near-ties that
    float32 arithmetic rounds the other way; a float32 one, such as a log-sum-exp, is near it."""
    if out.dtype == torch.float32:
        torch.testing.assert_close(out.double(), exact.double(), rtol=2e-6, atol=2e-6)
        return
    assert (out == exact.to(out.dtype)).float().mean() > 0.99


def assert_equal_results(results, expected):
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


def assert_compiles(fn, *examples, wrt=None):
    """One dynamic graph without breaks serves all `examples`, with the eager bits and gradients."""
    graphs = []
    fast = compiled(fn, graphs)
    for inputs in examples:
        assert_equal_results(run(fast, inputs, wrt), run(fn, inputs, wrt))
    assert len(graphs) == 1, f"{len(graphs)} graphs for {len(examples)} examples"


def compiled(fn, graphs):
    """fn under torch.compile, without graph breaks; `graphs` collects the graphs it makes."""

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, dynamic=True, backend=keep)


@contextmanager
def at_cpu_level(name):
    """The C++ kernels use another instruction set than the best one."""
    from lumina_kernels import _C

    best = _C.cpu_level()
    _C.set_cpu_level(name)
    try:
        yield
    finally:
        _C.set_cpu_level(best)


def run_compiling(*arguments, **options):
    """Python with these arguments, in a process where Triton compiles and does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def raises(error, match, fn, inputs, **changed):
    """fn(**inputs), with some inputs replaced, raises `error` and says `match`."""
    with pytest.raises(error, match=match):
        fn(**{**inputs, **changed})


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _max(tensor):
    return tensor.abs().max().item()


def _rms(tensor):
    return tensor.square().mean().sqrt().item()
