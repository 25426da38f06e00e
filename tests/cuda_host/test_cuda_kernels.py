"""Every `__global__` function of csrc/ runs on the host."""

from functools import partial

import test_context_drop
import test_gate_residual_norm
import test_gqa_attention
import test_guided_step
import test_norm_modulate
import test_qk_norm_rope3d
import test_qk_norm_rope3d_pool
import test_rope3d
import test_rope_table
import test_sandwich_norm
import test_sandwich_norm_chain
import test_swiglu
import torch
from common import run
from cuda_host.backend import cuda_on_host
from cuda_host.build import CSRC, kernel_names

import lumina_kernels

# Inputs of each op; all float tensors among them are differentiated.
INPUTS = {
    "swiglu": test_swiglu.make_inputs,
    "norm_modulate": test_norm_modulate.make_inputs,
    "sandwich_norm": test_sandwich_norm.make_inputs,
    "sandwich_norm_chain": test_sandwich_norm_chain.make_inputs,
    "gate_residual_norm": test_gate_residual_norm.make_inputs,
    "rope3d": test_rope3d.make_inputs,
    "qk_norm_rope3d": test_qk_norm_rope3d.make_inputs,
    "qk_norm_rope3d_pool": test_qk_norm_rope3d_pool.make_inputs,
    "context_drop": test_context_drop.make_inputs,
}
# The others of the same op, which are not.
CONSTANTS = {
    "rope3d": lambda: test_rope3d.make_table(5, 12),
    "qk_norm_rope3d": lambda: test_rope3d.make_table(5, 12),
    "qk_norm_rope3d_pool": test_qk_norm_rope3d_pool.make_rest,
}
FORWARD = {
    "guided_step": test_guided_step.make_inputs,
    "gqa_attention": test_gqa_attention.make_inputs,
}


def low(inputs, dtype):
    """The inputs with their floating tensors in `dtype`."""
    floats = {n for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {name: value.to(dtype) if name in floats else value for name, value in inputs.items()}


def test_every_kernel_runs():
    with cuda_on_host() as host:
        for dtype in (torch.float32, torch.bfloat16):
            for name, make in INPUTS.items():
                constants = low(CONSTANTS[name](), torch.float32) if name in CONSTANTS else {}
                op = partial(getattr(lumina_kernels, name), backend="cuda", **constants)
                run(op, low(make(), dtype))
            table = low(test_rope_table.make_inputs(), dtype)
            heads = {name: table.pop(name) for name in "qk"}
            run(partial(lumina_kernels.rope_table, backend="cuda", **table), heads)
            for name, make in FORWARD.items():
                if (CSRC / "cuda" / f"{name}.cu").exists():
                    getattr(lumina_kernels, name)(**low(make(), dtype), backend="cuda")
        assert host.executed() == kernel_names()
