import test_gate_residual_norm
from cuda_host.backend import on_host

globals().update(on_host(test_gate_residual_norm))
