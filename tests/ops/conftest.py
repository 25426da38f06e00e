import pytest
import torch
from common import BACKENDS, at_cpu_level


@pytest.fixture(scope="module", autouse=True)
def cuda_is_an_ordinary_backend():
    """Without a GPU the CUDA sources run on the host, under backend="cuda"."""
    if torch.cuda.is_available() or "cuda" not in BACKENDS:
        yield
        return
    from cuda_host.backend import cuda_on_host

    with cuda_on_host():
        yield


@pytest.fixture(autouse=True)
def cpu_level(request):
    """The instruction set that the parameter of `common.IMPLEMENTATIONS` names."""
    mark = request.node.get_closest_marker("cpu_level")
    if mark is None:
        yield
        return
    with at_cpu_level(*mark.args):
        yield
