"""gqa_attention where every query has text of its own, text_mask (B, L, T), on every backend."""

from functools import partial

import pytest
import torch
from attention import eager, make_inputs
from common import (
    BACKENDS,
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_equal_results,
    cast,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_kernels import gqa_attention

every_backend = pytest.mark.parametrize("backend", ("torch", *BACKENDS))
every_kernel = pytest.mark.parametrize("backend", BACKENDS)
every_implementation = pytest.mark.parametrize("backend, dtype", IMPLEMENTATIONS)


def assert_attention(backend, inputs, dtype=torch.float32, expected=eager):
    op = partial(gqa_attention, backend=backend)
    assert_accurate(op, expected, inputs, dtype)


def results_of(backend, inputs):
    return run(partial(gqa_attention, backend=backend), inputs)


def regional(mask=None, **sizes):
    """Inputs with a random mask of every query, or that one."""
    inputs = make_inputs(**dict(B=2, L=9, L_kv=19, T=37, H=4, G=2, K=24) | sizes)
    if mask is None:
        shape = len(inputs["q"]), inputs["q"].shape[1], inputs["text_k"].shape[1]
        mask = torch.rand(shape, device=DEVICE) < 0.4
    return inputs | {"text_mask": mask}


# The tokens and the keys of two captions; tokens 3, 4 and 5 and from 20 on have none.
REGIONS = (torch.arange(3), torch.arange(17)), (torch.arange(6, 20), torch.arange(17, 53))


def mask_of_regions(L=23, T=53):
    mask = torch.zeros(2, L, T, dtype=torch.bool, device=DEVICE)
    for tokens, keys in REGIONS:
        mask[:, tokens[:, None], keys] = True
    return mask


def by_regions(q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate):
    """A softmax for every caption alone, by the tokens of its region alone."""
    out = eager(q, k, v, key_mask, scale)
    for tokens, keys in REGIONS:
        own = q[:, tokens], k, v, key_mask, scale
        text = text_k[:, keys], text_v[:, keys], None, text_gate
        out = out.index_copy(1, tokens.to(q.device), eager(*own, *text))
    return out


@every_implementation
def test_disjoint_regions_are_separate_captions(backend, dtype):
    inputs = regional(mask_of_regions(), L=23, T=53, K=72)
    assert_attention(backend, inputs, dtype, by_regions)


@every_implementation
@pytest.mark.parametrize(
    "K, H, G, L, T",
    # groups of 4, 3 and 1, and one with more heads than blocks have rows on the CPU; several blocks
    # of rows; one tile of text and several, the last one cut
    ((72, 8, 2, 9, 37), (24, 3, 1, 50, 105), (21, 2, 2, 70, 19), (16, 70, 1, 3, 100)),
)
def test_accuracy(backend, K, H, G, L, T, dtype):
    """Among the rows some without text, and among the keys some that nobody sees."""
    inputs = regional(K=K, H=H, G=G, L=L, T=T)
    inputs["text_mask"][:, 1::5] = inputs["text_mask"][0, :, 3::4] = False
    inputs["text_mask"][1, : L // 2, : T // 2] = False  # whole tiles of it
    assert_attention(backend, inputs, dtype)


@every_kernel
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_mask(backend, data):
    """Where few keys are left gradients cancel to 0: measured against the largest result."""
    B, G, R = (data.draw(st.integers(1, 2 + i % 2)) for i in range(3))
    L, T = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 35))
    bits = data.draw(st.lists(st.booleans(), min_size=B * L * T, max_size=B * L * T))
    mask = torch.tensor(bits, dtype=torch.bool, device=DEVICE).view(B, L, T)
    inputs = cast(regional(mask, B=B, L=L, L_kv=5, T=T, H=R * G, G=G, K=4))
    expected = run(gqa_attention, cast(inputs, torch.float64))
    largest = max(value.abs().max() for value in expected.values() if value.numel())
    for name, value in results_of(backend, inputs).items():
        assert (value - expected[name]).abs().le(2e-6 * largest).all(), name


@every_kernel
@pytest.mark.parametrize("biased", (False, True))
def test_beside_a_bias_and_a_negative_scale(backend, biased):
    inputs = regional(K=72) | {"scale": -0.2}
    if biased:
        inputs["bias"] = torch.randn(9, 19, dtype=torch.float64, device=DEVICE)
    assert_attention(backend, inputs)


@every_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_rows_without_text_are_those_of_attention_without_text(backend, dtype):
    """Bit for bit, also where other rows of the tile have text."""
    inputs = cast(regional(L=40, K=72), dtype)
    empty = torch.arange(40, device=DEVICE) % 3 == 1
    inputs["text_mask"][:, empty] = False
    alone = {n: x for n, x in inputs.items() if not n.startswith("text")}
    found, expected = results_of(backend, inputs), results_of(backend, alone)
    for name in {"out 0", "dq"} & found.keys():
        assert torch.equal(found[name][:, empty], expected[name][:, empty]), name
        assert not torch.equal(found[name], expected[name])


@every_backend
def test_no_row_with_text(backend):
    inputs = cast(regional())
    inputs["text_mask"].zero_()
    alone = {n: x for n, x in inputs.items() if not n.startswith("text")}
    found, expected = results_of(backend, inputs), results_of(backend, alone)
    for name, value in found.items():
        want = expected.get(name)
        assert value.eq(0).all() if want is None else torch.equal(value, want), name


@every_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_an_expanded_mask_is_one_for_all(backend, dtype):
    """Bit for bit: it takes the same way."""
    inputs = cast(make_inputs(B=3, L=9, L_kv=19, T=37, H=4, G=2, K=24), dtype)
    expanded = inputs | {"text_mask": inputs["text_mask"][:, None].expand(3, 9, 37)}
    assert_equal_results(results_of(backend, expanded), results_of(backend, inputs))


def shifted(mask):
    return torch.cat((mask.new_ones(1), mask.flatten()))[1:].view(mask.shape)


@every_kernel
@pytest.mark.parametrize(
    "lay_out",
    (
        lambda mask: mask.transpose(1, 2).contiguous().transpose(1, 2),
        lambda mask: mask.transpose(0, 2).contiguous().transpose(0, 2),
        lambda mask: mask.repeat_interleave(2, 2)[..., ::2],
        lambda mask: torch.cat((mask, ~mask), 1)[:, :9],
        shifted,
        lambda mask: mask[:1].expand(2, -1, -1),
        lambda mask: mask[:, :, :1].expand(-1, -1, 37),
        lambda mask: mask[:, :1, ::2].repeat_interleave(2, 2)[..., :37].expand(-1, 9, -1),
        lambda mask: mask.repeat_interleave(2, 2)[:, :1, ::2].expand(-1, 9, -1),
    ),
)
def test_masks_of_any_strides(backend, lay_out):
    inputs = cast(regional())
    mask = lay_out(inputs["text_mask"])
    same = mask[:, 0] if mask.stride(1) == 0 else mask.contiguous()
    found, expected = (results_of(backend, inputs | {"text_mask": m}) for m in (mask, same))
    assert_equal_results(found, expected)


@every_kernel
@pytest.mark.parametrize("big", (1e3, 3e38))
def test_keys_that_no_token_sees_do_not_matter(backend, big):
    inputs = cast(regional())
    inputs["text_mask"][0, :, 3:21] = inputs["text_mask"][1, :, ::2] = False
    unseen = ~inputs["text_mask"].any(1)[:, :, None, None]
    other = inputs | {n: inputs[n].masked_fill(unseen, big) for n in ("text_k", "text_v")}
    assert_equal_results(results_of(backend, other), results_of(backend, inputs))
