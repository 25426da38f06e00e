import test_guided_step
from cuda_host.backend import on_host

globals().update(on_host(test_guided_step))
