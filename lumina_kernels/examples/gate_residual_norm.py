from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    gate, scale, shift, _ = n.modulations(4)
    rows = {"y": n.rows(), "residual": n.rows()}
    affine = {"weight": n.normal(n.D), "bias": n.normal(n.D)}
    row = dict(zip(("gate", "scale", "shift"), n.modulations(3, 1), strict=True))
    return {
        "": {**rows, "gate": gate, "scale": scale, "shift": shift},
        "affine rms": {**rows, "gate": n.rows(), **affine, "kind": "rms"},
        "keepdim": {**rows, **row},
        "no gate": {**rows, "weight": n.normal(n.D), "kind": "rms"},
    }
