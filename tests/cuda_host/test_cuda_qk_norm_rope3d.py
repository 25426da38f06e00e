from functools import partial

import pytest
import test_qk_norm_rope3d
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
from test_qk_norm_rope3d import NORMS, eager, lower, make_inputs
from test_rope3d import fixed, make_table

from lumina_kernels import qk_norm_rope3d

globals().update(on_host(test_qk_norm_rope3d))


@pytest.fixture(params=["cuda"])
def kernel(request):
    return partial(qk_norm_rope3d, backend=request.param)


@pytest.fixture(autouse=True)
def host():
    with cuda_on_host():
        yield


SHAPES = (
    (1, 1, 1, 2, 4),
    (1, 13, 3, 1, 10),  # pieces of 8 and 2 channels; tokens of two blocks, the last not full
    (2, 11, 4, 2, 24),
    (1, 9, 8, 2, 48),
    (1, 2, 32, 8, 72),  # Lumina-Next's, two heads in a thread
    (1, 2, 34, 2, 96),  # two heads in a thread of the backward, one that is not there
    (1, 1, 29, 40, 128),  # four in a thread of the forward
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_accuracy_of_shapes(kernel, norm, shape, dtype):
    table = make_table(shape[1], shape[-1]) | {"norm": norm}
    assert_accurate(fixed(kernel, table), fixed(eager, table), make_inputs(*shape, norm), dtype)


@pytest.mark.parametrize("norm", NORMS[1:])
def test_rms_norm_without_weight(kernel, norm):
    table, none = make_table(3, 12) | {"norm": norm}, {"q_weight": None, "k_weight": None}
    inputs = make_inputs(L=3, norm=norm)
    for left_out in (none, {"q_weight": None}):
        assert_accurate(fixed(kernel, table), fixed(eager, table), inputs | left_out, torch.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_takes_views(kernel, norm):
    table = make_table(3, 16) | {"norm": norm}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = lower(make_inputs(L=3, K=16, norm=norm), dtype)
        assert_strided_is_same(fixed(kernel, table), inputs)
        for start in (0, 8, 3):  # one projection of q, k and more, aligned to 16 bytes and not
            fused = randn(2, 3, 112).to(dtype)[..., start : start + 96]
            q, k = (x.unflatten(-1, (-1, 16)) for x in fused.split((64, 32), -1))
            views = inputs | {"q": q, "k": k}
            views |= {
                name: torch.cat((x.new_zeros(3), x))[3:]
                for name, x in inputs.items()
                if name not in "qk" and x is not None
            }
            packed = {name: x if x is None else x.clone() for name, x in views.items()}
            packed |= {name: views[name].contiguous() for name in "qk"}
            assert_equal_results(
                run(fixed(kernel, table), views), run(fixed(kernel, table), packed)
            )


def test_takes_weights_of_another_dtype(kernel):
    table, inputs = make_table(3, 12), make_inputs(L=3)
    mixed = lower(inputs) | {name: inputs[name].bfloat16() for name in "qk"}
    mixed["k_bias"] = mixed["k_bias"].half()
    wide = lower(mixed)
    results, expected = run(fixed(kernel, table), mixed), run(fixed(kernel, table), wide)
    assert torch.equal(results["out 0"], expected["out 0"].bfloat16())
    assert torch.equal(results["out 1"], expected["out 1"].bfloat16())
    assert results["dk"].dtype == torch.bfloat16 and results["dq_bias"].dtype == torch.float32
    assert results["dk_bias"].dtype == torch.float16


@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_again(kernel, norm):
    table, inputs = make_table(17, 24) | {"norm": norm}, lower(make_inputs(1, 17, K=24, norm=norm))
    assert_equal_results(run(fixed(kernel, table), inputs), run(fixed(kernel, table), inputs))


def test_many_tokens(kernel):
    """More than four for each of the 512 blocks."""
    table, inputs = make_table(2051, 2), make_inputs(1, 2051, 1, 1, 2)
    assert_accurate(fixed(kernel, table), fixed(eager, table), inputs, torch.float32)


@pytest.mark.parametrize("shape", ((0, 5, 4, 2), (2, 0, 4, 2), (2, 5, 4, 2, 0)))
def test_nothing(kernel, shape):
    inputs = lower(make_inputs(*shape)) | {"q_weight": None}
    K = inputs["q"].shape[-1]
    results = run(fixed(kernel, make_table(shape[1], K)), inputs)
    assert results["out 0"].shape == results["dq"].shape == (*shape[:3], K)
    assert results["dk_weight"].eq(0).all() and results["dq_bias"].eq(0).all()


@pytest.mark.parametrize("H, G", ((0, 3), (3, 0)))
def test_one_without_heads(kernel, H, G):
    table = make_table(3, 16) | {"norm": "rms_per_head"}
    inputs = make_inputs(2, 3, H, G, 16, "rms_per_head")
    fns = (fixed(partial(qk_norm_rope3d, backend=name), table) for name in ("cuda", "torch"))
    assert_accurate(*fns, inputs, torch.float16)


def test_refuses(kernel):
    inputs = lower(make_inputs()) | make_table(5, 12)
    raises(TypeError, "takes no float64", kernel, inputs, q_bias=make_inputs()["q_bias"])
    wide = lower(make_inputs(1, 1, 200, 1, 64)) | make_table(1, 64)
    out, _ = kernel(**wide | {"q": wide["q"].requires_grad_()})
    raises(RuntimeError, "12800 values.*at most 8192", torch.Tensor.backward, {"self": out.sum()})
    wider = lower(make_inputs(1, 1, 257, 1, 64)) | make_table(1, 64)
    raises(RuntimeError, "16512 values.*at most 16384", kernel, wider)
