"""backend="cuda" without a GPU: the CUDA sources, run on the host."""

import functools
from contextlib import contextmanager

import pytest
import torch
from common import DTYPES
from cuda_host.build import NAMESPACE, load

from lumina_kernels import backend


@contextmanager
def cuda_on_host():
    """Within it, backend="cuda" takes CPU tensors; gives the `Host`."""
    host = load()
    found = backend.launchers

    def launchers(op, name):
        return getattr(torch.ops, NAMESPACE) if name == "cuda" else found(op, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "EMULATED", {*backend.EMULATED, "cuda"})
        patch.delitem(backend.MISSING, "cuda", raising=False)
        patch.setattr(backend, "launchers", launchers)
        yield host


@pytest.fixture
def cuda_host():
    """The same for a test, or a file of them, that imports it."""
    with cuda_on_host() as host:
        yield host


def on_host(module) -> dict:
    """The tests `test_kernel*` of a file, for backend="cuda" and every dtype, on the host. Where
    they take a fixture `kernel`, its parameter is "cuda"."""
    found = vars(module).items()
    return {name: _with_cuda(test) for name, test in found if name.startswith("test_kernel")}


def _with_cuda(test):
    @functools.wraps(test)
    def on_the_host(*args, **kwargs):
        with cuda_on_host():
            test(*args, **kwargs)

    both = [("cuda", dtype) for dtype in DTYPES]
    choices = {"backend": ["cuda"], "backend, dtype": both, "kernel, dtype": both}
    on_the_host.pytestmark = [
        pytest.mark.parametrize(
            mark.args[0], choices.get(mark.args[0], mark.args[1]), **mark.kwargs
        ).mark
        if mark.name == "parametrize"
        else mark
        for mark in getattr(test, "pytestmark", ())
    ]
    return on_the_host
