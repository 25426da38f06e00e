"""The backward kernels of gqa_attention. A block has 128 or 64 rows, or keys, and walks over tiles
of 16 to 64 of the others; float32's has 32 or 8 and walks over 32."""

import ctypes
from functools import partial

import pytest
import torch
from common import DTYPES, assert_accurate, cast, randn, run
from cuda_host.attention import assert_masked_tiles_are_not_read, op, useful_fraction
from cuda_host.build import CSRC, build
from ops.attention import eager, make_inputs, mask_of_ranges

HEAD_DIMS = (24, 32, 48, 64, 72, 80, 96, 112, 128, 256)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
@pytest.mark.parametrize("K", (72, 200))
def test_several_blocks_of_rows_and_of_keys(K, dtype):
    """The last ones cut, and keys with holes, whole blocks of them; the last sample has none."""
    inputs = make_inputs(B=2, L=45, L_kv=150, T=37, H=3, G=1, K=K)
    inputs["key_mask"][0, 20:90] = False
    assert_accurate(op, eager, inputs, dtype)


@every_dtype
def test_windows_of_masks(dtype):
    """Masks are read 1024 keys at a time."""
    inputs = make_inputs(B=2, L=2, L_kv=2105, H=2, G=1, K=24, text=False)
    inputs["key_mask"] = mask_of_ranges(2105, (1000, 1030), (2047, 2049), (2104, 2105))
    assert_accurate(op, eager, inputs, dtype)


@every_dtype
@pytest.mark.parametrize("K", (32, 72, 128, 256))
def test_bias_and_masks_of_tokens_own(K, dtype):
    """The kernels for both, at every size that they have."""
    inputs = make_inputs(B=2, L=7, L_kv=21, T=19, H=4, G=2, K=K)
    inputs["text_mask"] = torch.arange(2 * 7 * 19).view(2, 7, 19) % 3 != 1
    inputs["text_mask"][1, 4] = False
    assert_accurate(op, eager, inputs, dtype)
    assert_accurate(op, eager, inputs | {"bias": randn(4, 1, 21)}, dtype)


@every_dtype
@pytest.mark.parametrize("shape", ((2, 1, 9, 33), (4, 1, 33), (9, 33), (2, 4, 1, 33)))
def test_the_gradient_of_a_bias_is_summed_over_what_it_is_broadcast_along(shape, dtype):
    inputs = make_inputs(B=2, L=9, L_kv=33, H=4, G=2, K=24, text=False) | {"bias": randn(*shape)}
    assert_accurate(op, eager, inputs, dtype)


@every_dtype
@pytest.mark.parametrize("K", (72, 21))
def test_strided(K, dtype):
    """Every way to lie in memory gives the same bits: of one projection, heads first, with a step,
    or one element off from where 16-byte accesses may begin. The output's gradient, too."""
    inputs = cast(make_inputs(B=2, L=5, L_kv=21, T=9, H=4, G=2, K=K), dtype)
    names = ("q", "k", "v", "text_k", "text_v")
    rest = {n: x for n, x in inputs.items() if n not in names}
    dout = randn(2, 5, 4, K).to(dtype)

    def gradients(way):
        leaves = [way(inputs[n]).requires_grad_() for n in names]
        out = op(**dict(zip(names, leaves, strict=True)), **rest)
        return torch.autograd.grad(out, leaves, way(dout))

    ways = (
        lambda x: torch.cat((x, torch.full_like(x, torch.nan)), 2).chunk(2, 2)[0],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    )
    expected = gradients(lambda x: x.clone())
    for way in ways:
        for value, other in zip(gradients(way), expected, strict=True):
            assert torch.equal(value, other)


def test_a_gradient_that_is_one_number():
    """That of a sum is expanded: all its steps are 0."""
    inputs = cast(make_inputs(B=2, L=5, K=24, text=False), torch.float16)
    q = inputs.pop("q").requires_grad_()
    out = op(q, **inputs)
    (expanded,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (written,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.equal(expanded, written) and expanded.abs().max() > 0


@every_dtype
def test_the_text_takes_its_part_of_the_output(dtype):
    """A large gate: the image's rows of dout . out are what is left of the whole."""
    inputs = make_inputs(B=1, L=9, L_kv=19, T=11, H=2, G=1, K=24)
    inputs |= {"key_mask": None, "text_mask": None, "text_v": 4 * inputs["text_v"]}
    assert_accurate(op, eager, inputs | {"text_gate": torch.tensor((2.0, -0.7)).double()}, dtype)


def test_ldmatrix_has_no_bank_conflicts(cuda_host):
    before = cuda_host.count("bank_conflicts")
    for K in HEAD_DIMS:
        inputs = cast(make_inputs(B=1, L=9, L_kv=19, T=5, H=2, G=1, K=K), torch.float16)
        run(op, inputs)
        if K in (32, 80, 128, 256):
            run(op, inputs | {"bias": randn(19).half()})
    assert cuda_host.count("bank_conflicts") == before


def test_masked_tiles_are_not_read(cuda_host):
    assert_masked_tiles_are_not_read(cuda_host, partial(run, op), L=16, L_kv=512, valid=128)


def test_useful_fraction(cuda_host, tmp_path):
    """Of 7 products 4 have 80 columns for 72, and 3 have 72: of what runs. For 256 columns the
    blocks of dk and dv, of which each has a half, compute scores and dP twice."""
    source = tmp_path / "probe.cu"
    source.write_text("""
        #include "cuda/gqa_attention_bwd_mma.cuh"
        #pragma GCC visibility push(default)
        extern "C" double useful_fraction(int K) {
          return lumina_kernels::cuda::attention_bwd_useful_fraction(K);
        }
    """)
    library = ctypes.CDLL(str(build([source], CSRC)))
    library.useful_fraction.restype = ctypes.c_double
    assert library.useful_fraction(72) == 7 * 72 / (4 * 80 + 3 * 72) > 0.94
    for K in HEAD_DIMS:
        forward = useful_fraction(cuda_host, lambda x: op(**x), 128, 128, K, products=2)
        # Of the forward and the backward, which run one after the other.
        both = useful_fraction(cuda_host, partial(run, op), 128, 128, K, products=9)
        found = 7 / (9 / both - 2 / forward)
        assert found == pytest.approx(library.useful_fraction(K) * (7 / 9 if K == 256 else 1)), K
