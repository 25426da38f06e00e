import torch

from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    inputs = {"q": n.heads(n.H), "k": n.heads(n.G), "v": n.heads(n.G)}
    text = {"text_k": n.heads(n.G, n.T), "text_v": n.heads(n.G, n.T)}
    text |= {"text_mask": n.mask(n.T), "text_gate": n.normal(n.H)}
    # One caption for every second token, another for the others, and none for the last one.
    token, key = torch.arange(n.L, device=n.device)[:, None], torch.arange(n.T, device=n.device)
    regions = ((token + key) % 2 == 0) & (token < n.L - 1) & n.mask(n.T)[:, None]
    return {
        "text": {**inputs, "key_mask": n.mask(n.L), **text},
        "regions": {**inputs, "key_mask": n.mask(n.L), **text, "text_mask": regions},
        "plain": inputs,
        "bias": {**inputs, "bias": n.normal(n.B, 1, 1, n.L)},
        "lse": {**inputs, "return_lse": True},
        "bias of pairs": {**inputs, "bias": n.normal(1, n.H, n.L, n.L)},
    }
