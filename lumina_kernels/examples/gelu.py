from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    x, wide = n.normal(n.B, n.L, n.F), n.normal(n.B, n.L, 2 * n.F)
    return {
        "tanh": {"x": x, "approximate": "tanh"},
        "none": {"x": x},
        "part": {"x": wide.chunk(2, -1)[1]},
    }
