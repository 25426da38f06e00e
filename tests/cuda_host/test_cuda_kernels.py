"""Every `__global__` function of csrc/ runs on the host."""

from functools import partial

import torch
from common import run
from cuda_host.build import kernel_names

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
        run_examples("gqa_attention", Sizes(B=1, grid=(1, 8, 64), K=72, dtype=torch.bfloat16))
    assert cuda_host.executed() == kernel_names()
