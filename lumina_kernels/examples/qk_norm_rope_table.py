from lumina_kernels.examples import rope_table
from lumina_kernels.examples._sizes import Sizes
from lumina_kernels.examples.qk_norm_rope3d import normed_heads
from lumina_kernels.ops.qk_norm_rope3d import NORMS


def examples(n: Sizes) -> dict[str, dict]:
    """Each norm with another form of tables."""
    tables = rope_table.examples(n)
    forms = {
        NORMS[0]: (n.G, tables["interleaved"]),
        f"{NORMS[1]}, complex": (n.G, tables["complex"]),
        f"{NORMS[2]}, each head": (n.H, tables["each head, no k"]),
    }
    found = {}
    for norm, (name, (G, form)) in zip(NORMS, forms.items(), strict=True):
        table = {key: x for key, x in form.items() if key not in ("q", "k")}
        found[name] = normed_heads(n, norm, G) | table
    return found
