from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    scale, shift, *_ = n.modulations(4)
    affine = {"weight": n.normal(n.D), "bias": n.normal(n.D)}
    tokens = dict(zip(("scale", "shift"), n.modulations(2, n.L), strict=True))
    row = dict(zip(("scale", "shift"), n.modulations(2, 1), strict=True))
    return {
        "rms": {"x": n.rows(), "weight": n.normal(n.D), "scale": scale},
        "layer": {"x": n.rows(), "scale": scale, "shift": shift, "kind": "layer"},
        "affine": {"x": n.rows(), **affine, **tokens},
        "keepdim": {"x": n.rows(), **row, "kind": "layer"},
    }
