import torch

from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    size = n.B, 4, n.grid[1] * 8, n.grid[2] * 8  # latents with patches of 8
    x, v = n.normal(*size), n.normal(2 * n.B, *size[1:])
    numbers = {"weight": torch.tensor(4.0, device=n.device), "dt": torch.tensor(0.1)}
    return {
        "": {"x": x, "v": v, "weight": 4.0, "dt": 0.1, "channels": 3},
        "tensors": {"x": x, "v": v, **numbers},
    }
