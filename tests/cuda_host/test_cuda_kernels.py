"""Every `__global__` function of csrc/ runs on the host."""

from functools import partial

import torch
from common import cast, run
from cuda_host.build import kernel_names
from ops.attention import make_inputs

import lumina_kernels
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS

NO_BACKWARD = {"guided_step"}
TABLES = {"positions", "inv_freq", "cos", "sin"}  # without a gradient, too


def run_examples(op, sizes):
    kernel = partial(getattr(lumina_kernels, op), backend="cuda")
    for inputs in examples(op, sizes).values():
        run(kernel, inputs, wrt=() if op in NO_BACKWARD else inputs.keys() - TABLES)


def test_every_kernel_runs(cuda_host, monkeypatch):
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16):
            run_examples(op, Sizes(dtype=dtype))
    monkeypatch.setenv("LUMINA_KERNELS_HOPPER", "1")
    run_examples("gqa_attention", Sizes(K=72, dtype=torch.bfloat16))
    monkeypatch.delenv("LUMINA_KERNELS_HOPPER")
    with cuda_host.multiprocessors(132):
        few = make_inputs(B=1, L=3, L_kv=600, H=2, G=1, K=72, text=False)
        lumina_kernels.gqa_attention(**cast(few, torch.bfloat16), backend="cuda")
    assert cuda_host.executed() == kernel_names()
