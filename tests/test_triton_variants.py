"""How many variants of a kernel Triton compiles: those that alignment asks for, and no more."""

import pytest
from common import run_compiling

from lumina_kernels.ops import OPS

# Keys of Triton's cache for pictures of several sizes, all even, with captions of one length.
COUNT = """
import sys
import torch
import lumina_kernels
from lumina_kernels import aot
from lumina_kernels.examples import Sizes, examples
from triton.runtime import jit

class Enough(Exception):
    pass

def keep(kernel, key, *args, **kwargs):
    keys.add(key)
    raise Enough

jit.JITFunction._do_compile = keep
with aot.offline(90):
    for op in sys.argv[1:]:
        keys = set()
        for sides in ((16, 16), (16, 18), (10, 11), (9, 12), (14, 15), (2, 2)):
            sizes = Sizes(B=B, grid=(1, *sides), T=T, H=32, G=8, K=72, F=96, dtype=torch.bfloat16)
            arguments = examples(op, sizes)
            try:
                inputs = arguments.get("plain", next(iter(arguments.values())))
                getattr(lumina_kernels, op)(**inputs, backend="triton")
            except Enough:
                pass
        print(op, len(keys))
"""
# Of windows the grid comes as a tuple, whose numbers Triton looks at one by one; the means of a
# LayerNorm lie behind the other statistics, where 16 divides the address or not. Attention spills
# more registers where it does not know whether 16 divides the numbers of tokens and keys.
MOST = dict.fromkeys(OPS, 1) | {
    "context_drop": 3, "qk_norm_rope3d_pool": 3, "gate_residual_norm": 2,
    "gqa_attention": 2,
}  # fmt: skip


@pytest.mark.parametrize("B", (1, 2))
def test_the_number_of_tokens_makes_no_variants(B):
    code = f"B, T = {B}, 33\n{COUNT}"
    done = run_compiling("-c", code, *OPS)
    found = {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}
    assert found.keys() == set(OPS), done.stderr
    assert {op: count for op, count in found.items() if count > MOST[op]} == {}
