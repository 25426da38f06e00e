import test_sandwich_norm
from cuda_host.backend import on_host

globals().update(on_host(test_sandwich_norm))
