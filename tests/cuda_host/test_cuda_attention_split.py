"""gqa_attention's forward over parts of the keys, on a device of 132 processors, which the few
blocks of these tests leave without work."""

from functools import partial

import pytest
import torch
from common import DTYPES, assert_accurate, cast
from cuda_host.attention import assert_forward, op, saved
from ops.attention import eager, make_inputs, mask_of_ranges

from lumina_kernels import gqa_attention, merge_attention

LAST = "gqa_attention_combine_kernel"
HALVES = DTYPES[1:]


@pytest.fixture(autouse=True)
def processors(cuda_host):
    with cuda_host.multiprocessors(132):
        yield


def is_split(cuda_host, inputs):
    with torch.no_grad():
        op(**cast(inputs, torch.float16))
    return cuda_host.latest() == LAST


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("K, L_kv", ((72, 500), (21, 1490), (96, 700), (128, 400), (256, 300)))
def test_head_dims(cuda_host, K, L_kv, dtype):
    """The last part cut, keys with holes, a sample without any; a text beside the parts."""
    inputs = make_inputs(B=2, L=9, L_kv=L_kv, T=37, H=3, G=1, K=K)
    assert_forward(inputs, dtype)
    assert cuda_host.latest() == LAST
    assert_forward(inputs | {"key_mask": None, "scale": -0.2}, dtype)
    del inputs["text_k"], inputs["text_v"], inputs["text_mask"], inputs["text_gate"]
    assert_forward(inputs, dtype)
    assert cuda_host.latest() == LAST


@pytest.mark.parametrize("L_kv", (2208, 2205))
@pytest.mark.parametrize("ranges", (((0, 2205),), ((1000, 1030), (2047, 2049)), ((2204, 2205),)))
def test_parts_within_windows_of_masks(cuda_host, L_kv, ranges):
    """Parts without a valid key, and masks that are read in the middle of a window."""
    inputs = make_inputs(B=2, L=3, L_kv=L_kv, T=70, H=2, G=1, K=72)
    inputs |= {"key_mask": mask_of_ranges(L_kv, *ranges), "text_mask": mask_of_ranges(70, (3, 5))}
    assert_forward(inputs, torch.float16)
    assert cuda_host.latest() == LAST


def test_scores_that_rise_from_part_to_part():
    """Weights of one part beside another's, far out of float32's range."""
    inputs = make_inputs(B=1, L=5, L_kv=900, H=2, G=1, K=64, text=False) | {"key_mask": None}
    inputs["q"] = inputs["q"].abs()
    rising = torch.linspace(-30, 30, 900, dtype=torch.float64)
    inputs["k"] = rising[None, :, None, None].expand(1, 900, 1, 64)
    assert_forward(inputs, torch.bfloat16)
    assert_forward(inputs | {"k": inputs["k"].flip(1)}, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients(dtype):
    """By what the parts kept together."""
    inputs = make_inputs(B=2, L=5, L_kv=400, T=9, H=4, G=2, K=72)
    assert_accurate(op, eager, inputs, dtype)


def test_masked_tiles_are_not_read(cuda_host):
    """128 rows, one block for a part: a mask saves the bytes of the keys and values it hides."""
    inputs = make_inputs(B=1, L=32, L_kv=2048, H=4, G=1, K=72, text=False)

    def bytes_read(valid):
        before = cuda_host.count("bytes_read")
        with torch.no_grad():
            op(**cast(inputs, torch.float16) | {"key_mask": torch.arange(2048)[None] < valid})
        return cuda_host.count("bytes_read") - before

    assert bytes_read(2048) - bytes_read(1024) == 1024 * 2 * 72 * 2


def test_only_where_the_grid_is_small_and_the_keys_are_many(cuda_host):
    few = make_inputs(B=1, L=9, L_kv=600, H=4, G=1, K=72, text=False)
    assert is_split(cuda_host, few)
    assert not is_split(cuda_host, make_inputs(B=1, L=9, L_kv=190, H=4, G=1, K=72, text=False))
    assert not is_split(cuda_host, few | {"bias": torch.zeros(600, dtype=torch.float64)})
    with cuda_host.multiprocessors(0):
        assert not is_split(cuda_host, few)


def test_nobody_depends_on_the_order_of_blocks():
    """The host takes blocks in the other order at every second launch."""
    inputs = cast(make_inputs(B=2, L=9, L_kv=500, H=4, G=2, K=72), torch.bfloat16)
    first, second = saved(inputs), saved(inputs)
    assert all(map(torch.equal, first, second))
    odd, even = saved(inputs), saved(inputs)
    assert all(map(torch.equal, odd, even)) and all(map(torch.equal, odd, first))


def test_parts_of_parts():
    """Halves of the keys, each taken in parts, merged by their log-sum-exps."""
    inputs = cast(make_inputs(B=2, L=5, L_kv=900, H=4, G=2, K=72, text=False), torch.float16)
    q, k, v, mask, scale = inputs.values()
    call = partial(gqa_attention, return_lse=True, backend="cuda")
    halves = [
        call(q, k[:, keys], v[:, keys], mask[:, keys], scale)
        for keys in (slice(0, 450), slice(450, 900))
    ]
    out, lse = merge_attention(*halves[0], *halves[1])
    whole, whole_lse = gqa_attention(
        **cast(inputs, torch.float64), return_lse=True, backend="torch"
    )
    assert (out - whole).abs().max() <= 2e-3 and (lse - whole_lse).abs().max() <= 1e-5
