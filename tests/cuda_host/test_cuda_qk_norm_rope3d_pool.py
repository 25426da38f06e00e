from functools import partial

import pytest
import test_qk_norm_rope3d_pool
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
from test_qk_norm_rope3d import NORMS, lower
from test_qk_norm_rope3d_pool import eager, make_inputs, make_rest
from test_rope3d import fixed

from lumina_kernels.ops.qk_norm_rope3d_pool import (
    qk_norm_rope3d_pool,
)

globals().update(on_host(test_qk_norm_rope3d_pool))


@pytest.fixture(params=["cuda"])
def kernel(request):
    return partial(qk_norm_rope3d_pool, backend=request.param)


@pytest.fixture(autouse=True)
def host():
    with cuda_on_host():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("norm", NORMS)
def test_accuracy(kernel, norm, masked, dtype):
    rest = make_rest(K=16, masked=masked, per_sample=masked, norm=norm)
    assert_accurate(fixed(kernel, rest), fixed(eager, rest), make_inputs(K=16, norm=norm), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grid, H, G, K, factor",
    (
        ((2, 2, 3), 3, 1, 10, 3),
        ((1, 2, 5), 1, 1, 4, 7),
        ((1, 3, 3), 4, 4, 24, 2),
        ((1, 2, 3), 32, 8, 72, 2),  # Lumina-Next's, two heads in a thread
        ((3, 1, 2), 5, 12, 96, 1),
        ((1, 1, 2), 30, 9, 128, 2),  # four in a thread
    ),
)
def test_accuracy_of_shapes(kernel, grid, H, G, K, factor, dtype):
    for norm in NORMS[:2]:
        rest = make_rest(1, grid, K, factor, norm=norm)
        fns = fixed(kernel, rest), fixed(eager, rest)
        assert_accurate(*fns, make_inputs(1, grid, H, G, K, norm), dtype)


def test_takes_views(kernel):
    for dtype in (torch.float32, torch.bfloat16):
        rest, inputs = make_rest(K=16), lower(make_inputs(K=16), dtype)
        assert_strided_is_same(fixed(kernel, rest), inputs)
        for start in (0, 3):  # one projection, aligned to 16 bytes and not
            heads = randn(2, 9, 131).to(dtype)[..., start : start + 128].split((64, 32, 32), -1)
            views = dict(zip("qkv", (x.unflatten(-1, (-1, 16)) for x in heads), strict=True))
            packed = {name: x.contiguous() for name, x in views.items()}
            results = [run(fixed(kernel, rest), inputs | x) for x in (views, packed)]
            assert_equal_results(*results)


@pytest.mark.parametrize("H, G", ((0, 3), (3, 0)))
def test_one_without_heads(kernel, H, G):
    rest, inputs = make_rest(norm=NORMS[1]), make_inputs(2, (1, 3, 3), H, G, 12, NORMS[1])
    fns = (fixed(partial(qk_norm_rope3d_pool, backend=name), rest) for name in ("cuda", "torch"))
    assert_accurate(*fns, inputs, torch.float16)


def test_same_bits_again(kernel):
    rest, inputs = make_rest(K=24), lower(make_inputs(K=24))
    assert_equal_results(run(fixed(kernel, rest), inputs), run(fixed(kernel, rest), inputs))
    raises(TypeError, "takes no float64", kernel, make_inputs(K=24) | rest)
