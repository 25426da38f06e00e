import torch
from torch import Tensor

from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    heads = {"q": n.heads(n.H), "k": n.heads(n.G)}
    table = {"cos": n.normal(n.L, n.K).float(), "sin": n.normal(n.L, n.K).float()}
    each = {"cos": n.normal(n.B, n.L, n.K).float(), "sin": n.normal(n.B, n.L, n.K).float()}
    some = n.K // 3 * 2
    pairs = n.normal(2, 1, n.L, n.K // 2).float()
    freqs = _complex(n.normal(n.B, n.L, 1, some // 2, 2))
    of_heads = n.normal(2, n.B, n.L, n.H, n.K // 2).float()
    return {
        "interleaved": {**heads, **table},
        "half": {**heads, **each, "pairing": "half"},
        "no k": {**heads, **table, "k": None},
        "pairs": {**heads, "cos": pairs[0], "sin": pairs[1]},
        "complex": {
            **heads, "cos": freqs.real, "sin": freqs.imag, "pairing": "half", "channels": some
        },
        "each head, no k": {**heads, "k": None, "cos": of_heads[0], "sin": of_heads[1]},
    }  # fmt: skip


def _complex(parts: Tensor) -> Tensor:
    return torch.view_as_complex(parts.float())
