import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before any kernel is imported: without a GPU Triton's interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# A loaded machine is slow, which says nothing about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_level(name): instruction set of the C++ kernels")
    # A worker of pytest-xdist ignores Ctrl-C, and so would the programs that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.hasten()


@pytest.fixture(autouse=True)
def seed_and_poison():
    """Fixed seed; and torch.empty returns NaN, so an element that nothing wrote fails the test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
