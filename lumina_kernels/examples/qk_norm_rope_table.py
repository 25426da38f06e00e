from lumina_kernels.examples import rope_table
from lumina_kernels.examples._sizes import Sizes
from lumina_kernels.examples.qk_norm_rope3d import normed_heads


def examples(n: Sizes) -> dict[str, dict]:
    """Each norm with another form of tables; the last one without k."""
    rotation = rope_table.examples(n)  # with q and k
    per_head, across, layer = (
        normed_heads(n, norm) for norm in ("rms_per_head", "rms_across_heads", "layer_across_heads")
    )
    without_k = dict.fromkeys(("k_weight", "k_bias"))
    return {
        "rms_per_head": per_head | rotation["interleaved"],
        "rms_across_heads, complex": across | rotation["complex"],
        "layer_across_heads, each head, no k": layer | rotation["each head, no k"] | without_k,
    }
