import test_swiglu
from cuda_host.backend import on_host

globals().update(on_host(test_swiglu))
