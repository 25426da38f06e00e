import os
import signal

import pytest
import torch

# Before any kernel is imported: without a GPU Triton's interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_level(name): instruction set of the C++ kernels")
    # A worker of pytest-xdist ignores Ctrl-C, and so would the programs that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _leave_out_what_the_interpreter_does_in_vain()


def _leave_out_what_the_interpreter_does_in_vain():
    """Triton's interpreter looks for overflow of every sum and product of integers and, without
    `debug`, drops what it finds: half its time. And it prepares triton.language for a kernel, and
    then again for every call of another function in it: skip the second."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    prepared = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in prepared:  # the others have the kernel's
            interpreter._patch_lang(self.fn)
            prepared.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def seed_and_poison():
    """Fixed seed; and torch.empty returns NaN, so an element that nothing wrote fails the test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
