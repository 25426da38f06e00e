"""Host time of one eager call of every op on the Triton backend: python -m benchmarks.launch_cost

No GPU is needed: a call goes through the op's checks, PyTorch's dispatcher, allocation and Triton's
launcher to a driver that launches nothing. On a GPU, add the launch by the real driver, a few
microseconds; its allocator replaces the CPU's. Times are medians. In the last column autograd
records the call.
"""

import argparse
import math
import statistics
import time
from functools import partial

import torch

import lumina_kernels as lk
from lumina_kernels import aot, backend

B, L, T, H, G, K = 2, 256, 32, 32, 8, 72


def calls() -> dict:
    """Op -> a call at the shapes of the 2B model, and the tensors that may want gradients."""
    D, F = H * K, 6144
    dtype = torch.bfloat16
    x, weight = torch.zeros(B, L, D, dtype=dtype), torch.zeros(D, dtype=dtype)
    scale, gate, *_ = torch.zeros(B, 4 * D, dtype=dtype).chunk(4, 1)
    q, k = torch.zeros(B, L, H, K, dtype=dtype), torch.zeros(B, L, G, K, dtype=dtype)
    text = torch.zeros(B, T, G, K, dtype=dtype)
    kv_weight, head_gate = torch.zeros(G * K, dtype=dtype), torch.zeros(H, dtype=dtype)
    mask, text_mask = torch.ones(B, L).bool(), torch.ones(B, T).bool()
    rope = torch.zeros(L, 3), torch.zeros(K // 2), torch.zeros(K // 2, dtype=torch.int64)
    cos = torch.zeros(L, K)
    norms = (weight, weight, kv_weight, kv_weight)
    latent = torch.zeros(B, 4, 128, 128, dtype=dtype)
    a = torch.zeros(B, L, F, dtype=dtype)
    grid = (1, 16, 16)
    return {
        "norm_modulate": partial(lk.norm_modulate, x, weight, scale=scale),
        "sandwich_norm": partial(lk.sandwich_norm, x, x, weight, gate),
        "sandwich_norm_chain": partial(lk.sandwich_norm_chain, x, x, weight, gate, weight, scale),
        "gate_residual_norm": partial(lk.gate_residual_norm, x, x, gate, scale=scale, shift=gate),
        "rope3d": partial(lk.rope3d, q, k, *rope),
        "rope_table": partial(lk.rope_table, q, k, cos, cos),
        "qk_norm_rope3d": partial(lk.qk_norm_rope3d, q, k, *norms, *rope),
        "qk_norm_rope3d_pool": partial(lk.qk_norm_rope3d_pool, q, k, k, *norms, *rope, grid, 2),
        "gqa_attention": partial(
            lk.gqa_attention, q, k, k, mask, None, text, text, text_mask, head_gate
        ),
        "context_drop": partial(lk.context_drop, k, k, grid, 2),
        "swiglu": partial(lk.swiglu, a, a),
        "guided_step": partial(lk.guided_step, latent[:1], latent, 4.0, 0.1, 3),
    }


def median_us(call, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--repeats", type=int, default=1000)
    repeats = parser.parse_args().repeats
    backend.DEVICES["triton"] = "cpu"  # the tensors are on the CPU here
    print(f"{'op':22}{'us':>7}{'with autograd':>15}")
    with aot.offline(90):
        for name, call in calls().items():
            call = partial(call, backend="triton")
            call()  # compiles
            with torch.no_grad():
                plain = median_us(call, repeats)
            leaf = call.args[0].detach().requires_grad_()
            try:
                recorded = median_us(
                    partial(call.func, leaf, *call.args[1:], **call.keywords), repeats
                )
            except NotImplementedError:  # the kernel has no gradient
                recorded = math.nan
            print(f"{name:22}{plain:7.1f}{recorded:15.1f}")


if __name__ == "__main__":
    main()
