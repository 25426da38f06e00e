from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    heads = {"q": n.heads(n.H), "k": n.heads(n.G)}
    table = {"cos": n.normal(n.L, n.K).float(), "sin": n.normal(n.L, n.K).float()}
    each = {"cos": n.normal(n.B, n.L, n.K).float(), "sin": n.normal(n.B, n.L, n.K).float()}
    return {
        "interleaved": {**heads, **table},
        "half": {**heads, **each, "pairing": "half"},
        "no k": {**heads, **table, "k": None},
    }
