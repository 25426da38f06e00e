from lumina_kernels.examples._sizes import Sizes
from lumina_kernels.examples.qk_norm_rope3d import norm_examples
from lumina_kernels.ops.qk_norm_rope3d import NORMS


def examples(n: Sizes) -> dict[str, dict]:
    inputs = {"v": n.heads(n.G), "grid": n.grid, "factor": 2}
    return {
        NORMS[0]: {**norm_examples(n, NORMS[0]), **inputs},
        "masked": {**norm_examples(n, NORMS[0]), **inputs, "key_mask": n.mask(n.L)},
    }
