import pytest
import torch
from common import BACKENDS


@pytest.fixture(scope="package", autouse=True)
def cuda_is_an_ordinary_backend():
    """Without a GPU the CUDA sources run on the host, under backend="cuda"."""
    if torch.cuda.is_available() or "cuda" not in BACKENDS:
        yield
        return
    from cuda_host.backend import cuda_on_host

    with cuda_on_host():
        yield
