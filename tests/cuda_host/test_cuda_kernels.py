"""Every `__global__` function of csrc/ runs on the host."""

from functools import partial

import torch
from common import run
from cuda_host.build import kernel_names

import lumina_kernels
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS

NO_BACKWARD = {"guided_step", "gqa_attention"}
TABLES = {"positions", "inv_freq", "cos", "sin"}  # without a gradient, too


def test_every_kernel_runs(cuda_host, monkeypatch):
    for op, hopper in ((op, hopper) for op in OPS for hopper in "01"):
        if hopper == "1" and op != "gqa_attention":
            continue
        monkeypatch.setenv("LUMINA_KERNELS_HOPPER", hopper)
        kernel = partial(getattr(lumina_kernels, op), backend="cuda")
        for dtype in (torch.float32, torch.bfloat16):
            for inputs in examples(op, Sizes(dtype=dtype)).values():
                run(kernel, inputs, wrt=() if op in NO_BACKWARD else inputs.keys() - TABLES)
    assert cuda_host.executed() == kernel_names()
