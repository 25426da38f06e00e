import os

import pytest
import torch

# Before any kernel is imported: without a GPU Triton's interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed_and_poison():
    """Fixed seed; and torch.empty returns NaN, so an element that nothing wrote fails the test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
