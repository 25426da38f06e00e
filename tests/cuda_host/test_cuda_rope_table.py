from functools import partial

import pytest
import test_rope_table
import torch
from common import (
    DTYPES,
    assert_accurate,
    assert_equal_results,
    assert_strided_is_same,
    randn,
    run,
)
from cuda_host.backend import cuda_on_host, on_host
from test_rope_table import PAIRINGS, heads_and_table, rounding_matrices, with_table

from lumina_kernels import rope_table

globals().update(on_host(test_rope_table))


@pytest.fixture(params=["cuda"])
def kernel(request):
    return partial(rope_table, backend=request.param)


@pytest.fixture(autouse=True)
def host():
    with cuda_on_host():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize(
    "shape",
    (
        (2, 5, 4, 2, 12),
        (1, 1, 1, 1, 2),
        (1, 13, 3, 1, 10),
        (2, 3, 5, 2, 24),
        (1, 2, 12, 4, 72),
        (1, 2, 32, 8, 96),
        (1, 1, 24, 24, 128),
        (1, 1, 2, 1, 2062),  # a head in two blocks
    ),
)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_accuracy(kernel, pairing, shape, per_sample, dtype):
    inputs, table = heads_and_table(*shape, per_sample=per_sample)
    fns = (with_table(fn, table, pairing) for fn in (kernel, rounding_matrices))
    assert_accurate(*fns, inputs, dtype)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_queries_alone(kernel, pairing):
    inputs, table = heads_and_table(dtype=torch.float32)
    table |= {"pairing": pairing}
    both = run(lambda q, k: kernel(q, k, **table), inputs)
    alone = run(lambda q: kernel(q, None, **table)[0], {"q": inputs["q"]})
    assert_equal_results(alone, {name: both[name] for name in alone})
    assert kernel(inputs["q"], None, **table)[1] is None
    no_keys = run(lambda q, k: kernel(q, k, **table), inputs | {"k": inputs["k"][:, :, :0]})
    assert torch.equal(no_keys["out 0"], both["out 0"]) and no_keys["dk"].numel() == 0
    no_queries = run(lambda q, k: kernel(q, k, **table), inputs | {"q": inputs["q"][:, :, :0]})
    assert torch.equal(no_queries["out 1"], both["out 1"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_takes_views(kernel, pairing, dtype):
    inputs, table = heads_and_table(K=16, dtype=dtype)
    table |= {"pairing": pairing}
    assert_strided_is_same(lambda **kw: kernel(**kw, **table), inputs)
    views = table | {name: table[name].mT.contiguous().mT for name in ("cos", "sin")}
    gaps = table | {name: torch.cat((table[name],) * 2, -1)[:, :16] for name in ("cos", "sin")}
    odd = table | {"cos": torch.cat((table["cos"].new_zeros(5, 1), table["cos"]), -1)[:, 1:]}
    odd |= {"sin": table["sin"].expand(2, 5, 16)}
    for start, width in ((0, 104), (8, 104), (4, 104), (3, 104), (0, 107)):
        # One projection of q and k and more, aligned to 16, 8 bytes and not.
        q, k = randn(2, 5, width).to(dtype)[..., start : start + 96].split((64, 32), -1)
        q, k = q.unflatten(-1, (-1, 16)), k.unflatten(-1, (-1, 16))
        expected = kernel(q.contiguous(), k.contiguous(), **table)
        for other in (table, views, gaps, odd):
            for out, value in zip(kernel(q, k, **other), expected, strict=True):
                assert torch.equal(out, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_tables_of_another_dtype(kernel, pairing, dtype):
    inputs, table = heads_and_table(K=16, dtype=torch.bfloat16)
    table = {name: tensor.to(dtype) for name, tensor in table.items()} | {"pairing": pairing}
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    for out, expected in zip(kernel(**inputs, **table), kernel(**wide, **table), strict=True):
        assert torch.equal(out, expected.bfloat16())
    mixed = table | {"sin": table["sin"].float()}
    assert torch.equal(kernel(**inputs, **mixed)[0], kernel(**inputs, **table)[0])


@pytest.mark.parametrize("shape", ((0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 4, 2, 0)))
def test_nothing(kernel, shape):
    inputs, table = heads_and_table(*shape, dtype=torch.float32)
    results = run(lambda **kw: kernel(**kw, **table), inputs)
    assert results["out 0"].shape == results["dq"].shape == inputs["q"].shape
