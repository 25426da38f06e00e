from lumina_kernels.examples._sizes import Sizes
from lumina_kernels.ops.qk_norm_rope3d import NORMS


def normed_heads(n: Sizes, norm: str) -> dict:
    """Queries, keys and parameters of one kind of norm."""
    widths = (n.K, n.K) if norm == "rms_per_head" else (n.H * n.K, n.G * n.K)
    weights = dict(zip(("q_weight", "k_weight"), map(n.normal, widths), strict=True))
    biased = norm == "layer_across_heads"
    biases = {name: n.normal(*weights[name].shape) if biased else None for name in weights}
    biases = {"q_bias": biases["q_weight"], "k_bias": biases["k_weight"]}
    return {"q": n.heads(n.H), "k": n.heads(n.G), **weights, **biases, "norm": norm}


def norm_examples(n: Sizes, norm: str) -> dict:
    """The same, and positions."""
    return {**normed_heads(n, norm), **n.rope()}


def examples(n: Sizes) -> dict[str, dict]:
    return {norm: norm_examples(n, norm) for norm in NORMS}
