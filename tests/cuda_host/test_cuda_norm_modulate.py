import test_norm_modulate
from cuda_host.backend import on_host

globals().update(on_host(test_norm_modulate))
