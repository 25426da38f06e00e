"""Lumina2 and ZImage against their references, in float64 to the last digits and in 32 and 16 bits
by the accuracy rule; against diffusers' networks; lists of images, masks, context drop."""

from dataclasses import replace

import pytest
import torch
from common import DEVICE, assert_as_accurate
from joint_networks import CONFIGS, MASK, NETWORKS, inputs, pair
from networks import cast, grouped, randn, randomise, run, sizes_of
from torch._dynamo.testing import CompileCounter

from lumina import RopeScaling
from lumina.models.parts.windows import DroppedLayers

DROP = DroppedLayers(2, (True, False, True))
RAGGED = (4, 6), (8, 10), (2, 16)
BY_SIZE = dict(factor=None, base_size=2)
# name -> network, sizes of x, further arguments
CASES = {
    "lumina2": ("lumina2", [(8, 12)], {}),
    "lumina2, head_dim 120": ("lumina2-120", [(4, 6)], {}),
    "z_image": ("z_image", [(8, 12)], {}),
    "z_image, no padding": ("z_image", [(8, 16)], {}),
    "lumina2 ragged": ("lumina2", RAGGED, dict(base_seqlen=3)),
    "z_image ragged": ("z_image", RAGGED, dict(base_seqlen=3)),
    "z_image, one length": ("z_image", [(4, 12), (12, 4), (6, 8)], dict(context_drop=DROP)),
    "z_image, padding alike": ("z_image", [(4, 12), (2, 88), (6, 8)], {}),
    "lumina2 drop": ("lumina2", [(8, 12)], dict(context_drop=DROP)),
    "lumina2 drop at edges": ("lumina2", [(6, 10)], dict(context_drop=DROP)),
    "lumina2 drop ragged": ("lumina2", RAGGED, dict(context_drop=DROP)),
    "z_image drop": ("z_image", [(6, 10)], dict(context_drop=DROP, base_seqlen=5)),
    "z_image drop ragged": ("z_image", RAGGED, dict(context_drop=DROP)),
    **{
        kind: ("z_image", [(4, 12)], dict(rope_scaling=RopeScaling(kind, 2.0, base, **more)))
        for kind, base, more in (
            ("linear", None, {}),
            ("ntk", None, {}),
            ("watershed", None, dict(watershed=0.5)),
            ("frequency_aware", 64, {}),
            ("time_aware", None, {}),
        )
    },
    "by size": ("lumina2", RAGGED, dict(rope_scaling=RopeScaling("time_aware", **BY_SIZE))),
}


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_reference(name):
    network, sizes, settings = CASES[name]
    (ours, theirs), arguments = pair(network), inputs(*sizes)
    expected = run(theirs, arguments, **settings)
    results = run(ours, arguments, **settings)
    assert results.keys() == expected.keys()
    for key, rms in sizes_of(expected).items():
        error = (results[key] - expected[key]).abs().max()
        assert error <= 1e-11 * rms, f"{key}: {error:.2e} of {rms:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(CASES)[:13])
def test_as_accurate_as_eager(name, dtype):
    network, sizes, settings = CASES[name]
    (ours, theirs), arguments = pair(network, dtype, None), inputs(*sizes, dtype=dtype)
    high = run(theirs, arguments, **settings)
    low = run(theirs.to(dtype), cast(arguments, dtype), **settings)
    out = run(ours.to(dtype), cast(arguments, dtype), **settings)
    assert all(out[key].dtype == dtype for key in out)
    out, low, high = (grouped(r, high) for r in (out, low, high))
    assert_as_accurate("all", *(torch.cat(list(r.values())) for r in (out, low, high)))


@pytest.mark.parametrize("name", CONFIGS)
def test_text_in_any_slots(name):
    """What a mask leaves out has no place: holes and padding on either side change nothing."""
    (ours, _), (x, t, feats, mask) = pair(name), inputs((4, 6))
    expected = ours(x, t, feats, mask)
    spread = torch.zeros(3, 50, dtype=torch.bool, device=DEVICE)
    moved = torch.full((3, 50, 20), torch.nan, dtype=torch.float64, device=DEVICE)
    for i in range(3):
        slots = torch.arange(50 - 2 * (i % 2))[-int(mask[i].sum()) :]
        spread[i, slots] = True
        moved[i, slots] = feats[i, mask[i]]
    for out in (ours(x, t, moved, spread), ours(x, t, ours.encode_caption(moved, spread))):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_no_text(name):
    """A picture whose text is empty is drawn all the same, and as if alone."""
    (ours, theirs), (x, t, feats, mask) = pair(name), inputs((4, 6))
    mask = mask.clone()
    mask[1] = False
    out = ours(x, t, feats, mask)
    torch.testing.assert_close(out, theirs(x, t, feats, mask), rtol=0, atol=1e-11)
    with torch.no_grad():
        alone = ours(x[1:2], t[1:2], feats[1:2, :0], mask[1:2, :0])
    torch.testing.assert_close(alone, out[1:2].detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "sizes", [[(4, 6)], [(8, 16)], [(4, 6), (4, 10)], [(8, 16), (16, 16)]],
    ids=["padded", "not padded", "ragged, padded", "ragged, not padded"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_several_captions_of_an_image(name, sizes):
    """Of other lengths, so that the image lies elsewhere; the refiner's pass is shared or not."""
    (ours, theirs), (x, t, feats, mask) = pair(name), inputs(*sizes[:1])
    ragged, t = len(sizes) > 1, t[:2]
    x = [x[0], randn(4, *sizes[1])] if ragged else x[:2]
    feats, mask = torch.cat([feats, feats[:1]]), torch.cat([mask, mask[2:]])
    with torch.no_grad():
        out = ours(x, t, feats, mask)
        expected = theirs(x * 2 if ragged else torch.cat([x, x]), torch.cat([t, t]), feats, mask)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs the captions of an image in one batch")
def test_a_short_caption_is_not_padded():
    """Guidance's negative caption is a few words; a long prompt beside it costs it nothing."""
    (ours, _), (x, t, feats, mask) = pair("lumina2"), inputs((4, 6))
    assert feats.shape[1] > 5
    mask = torch.zeros_like(torch.cat([mask, mask]))
    mask[:3], mask[3:, 1:5], lengths = True, True, []
    ours.layers[0].attention.register_forward_pre_hook(lambda _, a: lengths.append(a[0].shape[1]))
    with torch.no_grad():
        out = ours(x, t, torch.cat([feats, feats]), mask)
        long, short = ours(x, t, feats, mask[:3]), ours(x, t, feats[:, 1:5], mask[3:, 1:5])
    assert lengths == [6 + feats.shape[1], 6 + 5, 6 + feats.shape[1], 6 + 4]
    torch.testing.assert_close(out, torch.cat([long, short]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_trains(name):
    """A few steps of descent halve the loss, from the initial weights of a new network."""
    torch.manual_seed(0)
    ours = type(pair(name)[0])(CONFIGS[name]).to(DEVICE)
    x, t, feats, mask = cast(inputs((4, 6)), torch.float32)
    assert not ours(x, t, feats, mask).any()  # adaLN-zero
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    target, losses = randn(*x.shape).float(), []
    for _ in range(30):
        loss = (ours(x, t, feats, mask) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in ours.parameters())  # DDP waits for every one
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_compiled_once_for_all_sizes(name):
    config = replace(CONFIGS[name], n_layers=1, n_refiner_layers=1)
    ours = randomise(NETWORKS[type(config)](config)).float().requires_grad_(False)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    with torch.no_grad():
        # No side is the number of channels, which the network fixes, or PyTorch would fix it too.
        for size in ((6, 10), (8, 14), (10, 6)):
            arguments = cast(inputs(size), torch.float32)
            expected = ours(*arguments)
            torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-5, atol=1e-5)
            graphs.add(counter.frame_count)
    assert len(graphs) == 1  # those of the first size serve the others


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 4, 5, 6)), "sides of x must be positive multiples of the patch"),
        (dict(x=torch.zeros(3, 3, 4, 6)), r"with C = 4 .* got shape \(3, 3, 4, 6\)"),
        (dict(t=torch.zeros(2)), r"t must have shape \(3,\) and there must be 3 captions"),
        (
            dict(x=torch.zeros(2, 4, 4, 6), t=torch.zeros(2)),
            r"2 captions .*multiple, got \(2,\) and 3",
        ),
        (dict(t=None), "x and t must be given together"),
        (dict(cap_feats=torch.zeros(3, 35, 21)), r"shape \(B, T, 20\), got \(3, 35, 21\)"),
        (dict(cap_mask=None), "cap_feats need a cap_mask"),
        (dict(cap_mask=MASK.float()), r"cap_mask must be bool of shape \(3, 35\)"),
        (dict(cap_mask=MASK[:, 1:]), r"got torch.bool of shape \(3, 34\)"),
        (dict(base_seqlen=1), "base_seqlen must be at least 2 tokens, got 1"),
        (dict(context_drop=DroppedLayers(2, (True,))), "context_drop must be for 3 layers, got 1"),
    ],
)
def test_refused(name, change, message):
    ours = pair(name)[0].float()
    arguments = dict(zip(("x", "t", "cap_feats", "cap_mask"), inputs((4, 6)), strict=True))
    arguments = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in {**arguments, **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        ours(**arguments)


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_norms_that_have_to_be_called(name):
    """A hook on a norm, or another norm in its place, is called and changes nothing else."""
    ours, arguments = pair(name)[0], inputs((4, 6))
    expected = ours(*arguments)
    calls = []
    for block in (ours.layers[1], ours.noise_refiner[0], ours.context_refiner[1]):
        for norm in (block.attention_norm1, block.ffn_norm2, block.attention.k_norm):
            norm.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(ours(*arguments), expected, rtol=0, atol=1e-11)
    assert len(calls) == 9
