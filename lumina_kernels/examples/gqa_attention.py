from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    inputs = {"q": n.heads(n.H), "k": n.heads(n.G), "v": n.heads(n.G)}
    text = {"text_k": n.heads(n.G, n.T), "text_v": n.heads(n.G, n.T)}
    text |= {"text_mask": n.mask(n.T), "text_gate": n.normal(n.H)}
    return {
        "text": {**inputs, "key_mask": n.mask(n.L), **text},
        "plain": inputs,
        "bias": {**inputs, "bias": n.normal(n.B, 1, 1, n.L)},
        "bias of pairs": {**inputs, "bias": n.normal(1, n.H, n.L, n.L)},
    }
