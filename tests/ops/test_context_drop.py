from functools import partial

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    IMPLEMENTATIONS,
    NATIVE,
    assert_accurate,
    assert_equal_results,
    assert_same_in_float64,
    raises,
    randn,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lumina_kernels import context_drop, gqa_attention


@pytest.fixture(params=BACKENDS)
def kernel(request):
    return partial(context_drop, backend=request.param)


def make_inputs(B=2, grid=(2, 5, 3), G=2, K=6, factor=2, masked=True):
    """With holes, and in the first sample a corner of 2 x 2 without a valid token."""
    T, H, W = grid
    inputs = {"k": randn(B, T * H * W, G, K), "v": randn(B, T * H * W, G, K)}
    mask = torch.arange(B * T * H * W, device=DEVICE).view(B, T, H, W) % 5 != 1
    mask[:1, :, :2, :2] = False
    return inputs | {
        "grid": grid,
        "factor": factor,
        "key_mask": mask.flatten(1) if masked else None,
    }


def with_loops(k, v, grid, factor, key_mask=None):
    """One window at a time, its tokens found by their coordinates."""
    T, H, W = grid
    B, L = k.shape[:2]
    rows = {"k": [], "v": [], "counts": []}
    for b in range(B):
        for t in range(T):
            for top in range(0, H, factor):
                for left in range(0, W, factor):
                    tokens = [
                        (t * H + h) * W + w
                        for h in range(top, min(top + factor, H))
                        for w in range(left, min(left + factor, W))
                    ]
                    tokens = [n for n in tokens if key_mask is None or key_mask[b, n]]
                    rows["counts"].append(len(tokens))
                    for name, x in (("k", k), ("v", v)):
                        mean = sum(x[b, n] for n in tokens) / max(len(tokens), 1)
                        rows[name].append(mean + 0 * x[b, 0])
    counts = torch.tensor(rows["counts"], dtype=torch.float32, device=k.device).view(B, -1)
    k_out, v_out = (torch.stack(rows[name]).view(B, -1, *k.shape[2:]) for name in ("k", "v"))
    return k_out, v_out, counts > 0, counts


def with_avg_pool(k, v, grid, factor, key_mask=None):
    """PyTorch's pooling of maps of the grid; no mask."""
    B, _, G, K = k.shape

    def pool(x):
        maps = x.unflatten(1, grid).permute(0, 1, 4, 5, 2, 3).flatten(0, 3).unsqueeze(1)
        maps = F.avg_pool2d(maps, factor, ceil_mode=True, count_include_pad=False)
        maps = maps.view(B, grid[0], G, K, *maps.shape[-2:])
        return maps.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)

    return pool(k), pool(v)


@pytest.mark.parametrize("masked", (False, True))
def test_gradcheck(masked):
    inputs = make_inputs(grid=(1, 3, 3), G=1, K=2, masked=masked)
    rest = {name: inputs.pop(name) for name in ("grid", "factor", "key_mask")}
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda k, v: context_drop(k, v, **rest)[:2], leaves)


@pytest.mark.parametrize("factor", (1, 2, 3, 7))
@pytest.mark.parametrize("masked", (False, True))
def test_matches_loops(factor, masked):
    assert_same_in_float64(context_drop, with_loops, make_inputs(factor=factor, masked=masked))


@pytest.mark.parametrize("grid", ((1, 4, 6), (2, 5, 3), (3, 1, 7)))
def test_matches_avg_pool(grid):
    assert_same_in_float64(
        lambda **kw: context_drop(**kw)[:2], with_avg_pool, make_inputs(grid=grid, masked=False)
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_grid_and_mask(data):
    grid = tuple(data.draw(st.integers(1, top)) for top in (2, 4, 4))
    inputs = make_inputs(1, grid, 1, 2, data.draw(st.integers(1, 5)))
    L = inputs["k"].shape[1]
    bits = data.draw(st.lists(st.booleans(), min_size=L, max_size=L))
    inputs["key_mask"] = torch.tensor(bits, device=DEVICE).view(1, L)
    assert_same_in_float64(context_drop, with_loops, inputs)
    assert context_drop(**inputs)[3].sum() == sum(bits)


def test_known_windows():
    k = torch.arange(15.0, device=DEVICE).view(1, 15, 1, 1)  # rows 0..4, 5..9, 10..14
    k_out, _, mask, counts = context_drop(k, k, (1, 3, 5), 2)
    assert k_out.flatten().tolist() == [3, 5, 6.5, 10.5, 12.5, 14]
    assert counts.tolist() == [[4, 4, 2, 2, 2, 1]] and mask.all()
    assert counts.dtype == torch.float32 and mask.dtype == torch.bool


def test_an_empty_window_is_zero_and_masked():
    inputs = make_inputs()
    inputs["k"][~inputs["key_mask"]] = torch.nan  # what is masked is not read
    k, _, mask, counts = context_drop(**inputs)
    assert not mask[0, 0] and counts[0, 0] == 0 and k[0, 0].eq(0).all()
    assert not k.isnan().any()


def test_factor_one_keeps_every_token():
    inputs = make_inputs(masked=False, factor=1)
    k, v, mask, counts = context_drop(**inputs)
    assert torch.equal(k, inputs["k"]) and torch.equal(v, inputs["v"])
    assert mask.all() and counts.eq(1).all()


def test_log_counts_weigh_a_window_by_its_tokens():
    """Attention to a window with bias log(count) is attention to its tokens, all at the mean."""
    inputs = make_inputs(grid=(1, 3, 3), masked=False)
    k, v, mask, counts = context_drop(**inputs)
    window = torch.tensor([0, 0, 1, 0, 0, 1, 2, 2, 3], device=DEVICE)
    q = randn(2, 4, 2, 6)
    weighed = gqa_attention(q, k, v, mask, bias=counts.log()[:, None, None])
    torch.testing.assert_close(weighed, gqa_attention(q, k[:, window], v[:, window]))


def test_errors():
    good, op = make_inputs(), context_drop
    raises(ValueError, r"k must have shape \(B, L, G, K\)", op, good, k=randn(2, 30, 12))
    raises(ValueError, r"v must have shape \(2, 30, 2, 6\)", op, good, v=randn(2, 30, 2, 5))
    raises(TypeError, "v must have the dtype of k", op, good, v=good["v"].float())
    raises(ValueError, r"T \* H \* W = 30, got \(2, 5, 4\)", op, good, grid=(2, 5, 4))
    raises(ValueError, r"T \* H \* W = 30, got \(5, 6\)", op, good, grid=(5, 6))
    raises(ValueError, r"T \* H \* W = 30, got \(2, -5, -3\)", op, good, grid=(2, -5, -3))
    raises(ValueError, "factor must be at least 1, got 0", op, good, factor=0)
    short = good["key_mask"][:, 1:]
    raises(ValueError, r"key_mask must have shape \(2, 30\)", op, good, key_mask=short)
    raises(TypeError, "key_mask must be bool", op, good, key_mask=randn(2, 30))


def make_low_inputs(*args, dtype=torch.float32, **kwargs):
    inputs = make_inputs(*args, **kwargs)
    return inputs | {name: inputs[name].to(dtype) for name in "kv"}


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("factor", (1, 2, 7))
def test_accuracy(kernel, factor, masked, dtype):
    assert_accurate(kernel, with_loops, make_inputs(factor=factor, masked=masked), dtype)


@pytest.mark.parametrize("kernel, dtype", IMPLEMENTATIONS, indirect=["kernel"])
@pytest.mark.parametrize(
    "grid, G, K",
    (((1, 1, 1), 1, 2), ((3, 1, 5), 3, 10), ((1, 4, 3), 5, 88), ((2, 1, 2), 9, 128)),
)
def test_accuracy_of_shapes(kernel, grid, G, K, dtype):
    assert_accurate(kernel, with_loops, make_inputs(1, grid, G, K, 2), dtype)


def test_masked_tokens_do_not_matter(kernel):
    inputs = make_low_inputs()
    clean = run(kernel, inputs)
    for garbage in (torch.nan, torch.inf):
        dirty = {name: inputs[name].clone() for name in "kv"}
        for tensor in dirty.values():
            tensor[~inputs["key_mask"]] = garbage
        assert_equal_results(run(kernel, inputs | dirty), clean)
    assert clean["dk"][~inputs["key_mask"]].eq(0).all() and clean["out 0"][0, 0].eq(0).all()


def test_views(kernel):
    """Parts of one projection, aligned to 16 bytes or not, and a mask with a stride."""
    inputs = make_low_inputs(grid=(1, 3, 4), K=16, dtype=torch.float16)
    inputs["key_mask"] = inputs["key_mask"].repeat_interleave(2, 1)[:, ::2]
    for start in (0, 8, 3):
        k, v = randn(2, 12, 88).half()[..., start : start + 64].split((32, 32), -1)
        views = inputs | {"k": k.unflatten(-1, (2, 16)), "v": v.unflatten(-1, (2, 16))}
        packed = {name: x.contiguous() if torch.is_tensor(x) else x for name, x in views.items()}
        assert_equal_results(run(kernel, views), run(kernel, packed))
    channels_first = inputs | {"k": inputs["k"].mT.contiguous().mT}
    assert_equal_results(run(kernel, channels_first), run(kernel, inputs))


def test_a_factor_far_beyond_the_grid(kernel):
    inputs = make_low_inputs(factor=7)
    assert_equal_results(run(kernel, inputs | {"factor": 2**40}), run(kernel, inputs))


@pytest.mark.parametrize("backend", NATIVE)
def test_without_heads_there_are_counts(backend):
    kernel = partial(context_drop, backend=backend)
    results, expected = run(kernel, make_low_inputs(G=0)), run(kernel, make_low_inputs())
    for name in ("out 2", "out 3"):
        assert torch.equal(results[name], expected[name])


def test_an_expanded_gradient(kernel):
    inputs = make_low_inputs(masked=False)
    k = inputs["k"].requires_grad_()
    kernel(**inputs)[0].sum().backward()
    counts = kernel(**inputs)[3]
    torch.testing.assert_close(k.grad.sum(), torch.tensor(12.0 * counts.numel()).to(k))
