from lumina_kernels.examples import rope_table
from lumina_kernels.examples._sizes import Sizes
from lumina_kernels.examples.qk_norm_rope3d import normed_heads


def examples(n: Sizes) -> dict[str, dict]:
    """Each norm with another form of tables; the last one without k."""
    rotation = rope_table.examples(n)  # with q and k
    rms_per_head, layer, rms = (
        normed_heads(n, norm) for norm in ("rms_per_head", "layer_across_heads", "rms_across_heads")
    )
    return {
        "rms_per_head": rms_per_head | rotation["interleaved"],
        "layer_across_heads, complex": layer | rotation["complex"],
        "rms_across_heads, each head, no k": rms | rotation["each head, no k"] | {"k_weight": None},
    }
