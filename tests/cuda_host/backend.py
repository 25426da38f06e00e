"""backend="cuda" without a GPU: the CUDA sources, run on the host."""

from contextlib import contextmanager

import pytest
import torch
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
