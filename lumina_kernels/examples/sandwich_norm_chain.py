from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    scale, gate, *_ = n.modulations(4)
    rows = {"y": n.rows(), "residual": n.rows(), "weight": n.normal(n.D)}
    row = dict(zip(("gate", "next_scale"), n.modulations(2, 1), strict=True))
    last = {"next_weight": None, "next_scale": None}
    return {
        "": {**rows, "gate": gate, "next_weight": n.normal(n.D), "next_scale": scale},
        "no factors": {**rows, "gate": n.rows(), **last},
        "keepdim no tanh": {**rows, **row, "next_weight": None, "tanh": False},
        "bare": {**rows, "weight": None, "gate": None, **last},
    }
