from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    inputs = {"k": n.heads(n.G), "v": n.heads(n.G), "grid": n.grid, "factor": 2}
    return {"": inputs, "masked": {**inputs, "key_mask": n.mask(n.L)}}
