import pytest
import torch


@pytest.fixture(autouse=True)
def dynamo_has_seen_no_other_model():
    """It makes a size dynamic that another model of the same code had otherwise, and gives up on
    hooks that many models have had."""
    torch._dynamo.reset()
