from lumina_kernels.examples._sizes import Sizes


def examples(n: Sizes) -> dict[str, dict]:
    a, b = n.normal(n.B, n.L, 2 * n.F).chunk(2, -1)
    return {"": {"a": a.contiguous(), "b": b.contiguous()}, "halves": {"a": a, "b": b}}
