from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    _, gate, *_ = n.modulations(4)
    rows = {"y": n.rows(), "residual": n.rows(), "weight": n.normal(n.D)}
    return {
        "": {**rows, "gate": gate},
        "per token": {**rows, "gate": n.rows()},
        "keepdim no tanh": {**rows, "gate": n.modulations(2, 1)[1], "tanh": False},
        "bare": {**rows, "weight": None, "gate": None},
    }
