import gc
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before any kernel is imported: without a GPU Triton's interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The files that take longest, which workers of pytest-xdist take first, or one of them would work
# on the last of them when the others have nothing left to do.
LONGEST = (
    "test_dropin_models.py", "test_contract.py", "test_aot.py", "test_gpu_report.py",
    "test_readme.py", "test_model_triton.py", "test_cli.py", "test_joint_model.py",
    "test_processes.py",
)  # fmt: skip

# A loaded machine is slow, which says nothing about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, runs with --slow")
    config.addinivalue_line("markers", "cpu_level(name): instruction set of the C++ kernels")
    # A worker of pytest-xdist ignores Ctrl-C, and so would the programs that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Workers share the processor, and threads of one that wait for each other keep the others
    # waiting. NumPy's, which compute the products of Triton's interpreter, read it in the workers:
    # a product of two tiles of 64 x 128 takes 3.4 ms of two busy cores, of one 0.08.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the programs that tests start
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.hasten()


def pytest_collection_finish():
    """What was imported stays: the collector need not go through its millions of objects each time
    that the graph of a model has made some thousands."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish():
    # Else nanobind calls what was not collected at the end a leak, behind the last line of pytest.
    gc.unfreeze()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        config.hook.pytest_deselected(
            items=[item for item in items if item.get_closest_marker("slow")]
        )
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def seed_and_poison():
    """Fixed seed; and torch.empty returns NaN, so an element that nothing wrote fails the test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
