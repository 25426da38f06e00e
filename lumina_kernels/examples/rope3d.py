from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    heads = {"q": n.heads(n.H), "k": n.heads(n.G)}
    table = n.rope()
    each = {name: table[name].expand(n.B, *table[name].shape) for name in ("positions", "inv_freq")}
    return {"": {**heads, **table}, "per sample": {**heads, **table, **each}}
