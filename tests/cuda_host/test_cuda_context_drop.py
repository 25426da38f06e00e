from functools import partial

import pytest
import test_context_drop
import torch
from common import (
    DTYPES,
    assert_accurate,
    assert_equal_results,
    assert_strided_is_same,
    raises,
    randn,
    run,
)
from cuda_host.backend import cuda_on_host, on_host
from test_context_drop import make_inputs, make_low_inputs, with_loops

from lumina_kernels import context_drop

globals().update(on_host(test_context_drop))


@pytest.fixture(params=["cuda"])
def kernel(request):
    return partial(context_drop, backend=request.param)


@pytest.fixture(autouse=True)
def host():
    with cuda_on_host():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("factor", (1, 2, 3, 7, 2**40))
def test_accuracy(kernel, factor, masked, dtype):
    inputs = make_inputs(factor=factor, masked=masked, K=16)
    same = {"factor": min(factor, 7)}
    assert_accurate(kernel, lambda **kw: with_loops(**kw | same), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grid, G, K",
    (((1, 1, 1), 1, 2), ((3, 1, 5), 3, 10), ((1, 4, 3), 8, 72), ((2, 1, 2), 9, 128)),
)
def test_accuracy_of_shapes(kernel, grid, G, K, dtype):
    assert_accurate(kernel, with_loops, make_inputs(1, grid, G, K, 2), dtype)


def test_takes_views(kernel):
    for dtype in (torch.float32, torch.bfloat16):
        assert_strided_is_same(kernel, make_low_inputs(K=16, dtype=dtype))
        inputs = make_low_inputs(grid=(1, 3, 4), K=16, dtype=dtype)
        for start in (0, 8, 3):  # one projection of k, v and more, aligned to 16 bytes and not
            k, v = randn(2, 12, 88).to(dtype)[..., start : start + 64].split((32, 32), -1)
            views = inputs | {"k": k.unflatten(-1, (2, 16)), "v": v.unflatten(-1, (2, 16))}
            views["key_mask"] = inputs["key_mask"].repeat_interleave(2, 1)[:, ::2]
            packed = {n: x.contiguous() if torch.is_tensor(x) else x for n, x in views.items()}
            assert_equal_results(run(kernel, views), run(kernel, packed))
        swapped = inputs | {"k": inputs["k"].mT.contiguous().mT}
        assert_equal_results(run(kernel, swapped), run(kernel, inputs))


def test_nothing(kernel):
    results = run(kernel, make_low_inputs(B=0))
    assert results["out 0"].shape == (0, 12, 2, 6) and results["dv"].shape == (0, 30, 2, 6)
    results = run(kernel, make_low_inputs(grid=(0, 5, 3)))
    assert results["out 3"].shape == (2, 0) and results["dk"].shape == (2, 0, 2, 6)
    results, expected = run(kernel, make_low_inputs(G=0)), run(kernel, make_low_inputs())
    for name in ("out 2", "out 3"):
        assert torch.equal(results[name], expected[name])


def test_same_bits_again(kernel):
    inputs = make_low_inputs(factor=3)
    assert_equal_results(run(kernel, inputs), run(kernel, inputs))
    raises(TypeError, "takes no float64", kernel, make_inputs())
