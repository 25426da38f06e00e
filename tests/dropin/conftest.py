import pytest
import torch


@pytest.fixture(autouse=True)
def dynamo_has_seen_no_other_model():
    """It makes a size dynamic that another model of the same code had otherwise, and gives up on
    hooks that many models have had."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
