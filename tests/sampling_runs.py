"""Small sampling runs, and the same as a plain loop around lumina.reference."""

import functools

import torch
from common import DEVICE
from networks import AUDIO, VIDEO, pair, randn

from lumina import Guidance, sample

SIZE = (4, 6)
MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
NEGATIVE_MASK = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool)


@functools.cache
def models(kind="image"):
    """Ours and the reference in float64, with velocities of about 1."""
    torch.manual_seed(1)
    sizes = dict(dim=48, n_layers=1, in_channels=4, learn_sigma=False)
    kinds = {"image": {}, "video": VIDEO, "audio": {**AUDIO, "in_channels": 4}}
    ours, theirs = pair(**{**sizes, **kinds[kind]})
    return ours.eval(), theirs.eval()


@functools.cache
def captions():
    """Two captions of 5 tokens and two negative ones of 3."""
    torch.manual_seed(2)
    feats, negative = randn(2, 5, 24), randn(2, 3, 24)
    return feats, MASK.to(DEVICE), negative, NEGATIVE_MASK.to(DEVICE)


def noise(*size, B=2):
    torch.manual_seed(3)
    return randn(B, 4, *(size or SIZE))


def draw(model=None, texts=None, **changes):
    """sample() of two pictures in 3 steps, from fixed noise unless changed."""
    own = dict(size=SIZE, steps=3, solver="euler", schedule="rational:2", latents=noise())
    own.update(changes)
    if "generator" in changes:
        del own["latents"]
    return sample(model or models()[0], *(texts or captions()), **own)


@torch.no_grad()
def loop(
    net, x, grid, solver="euler", guidance=4.0, context_drop=None, **rope
):  # fmt: skip
    """The same as plainly as it can be written, with two calls of the network."""
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    feats, mask, negative, negative_mask = captions()

    def velocity(t, x):
        time = torch.full((len(x),), t, dtype=torch.float64, device=DEVICE)
        if context_drop is not None:
            rope["context_drop"] = context_drop.at(t, len(net.layers))
        cond = net(x, time, feats, mask, **rope)
        if guidance.scale == 1 or t >= guidance.until:
            return cond
        uncond = net(x, time, negative, negative_mask, **rope)
        v = uncond + guidance.scale * (cond - uncond)
        if guidance.channels is not None:
            v[:, guidance.channels :] = cond[:, guidance.channels :]
        if guidance.renorm is not None:
            for a, b in zip(v, cond, strict=True):
                a *= min(1.0, float(guidance.renorm * b.norm() / a.norm()))
        return v

    for t, end in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        h, v = end - t, velocity(t, x)
        if solver == "midpoint":
            v = velocity(t + h / 2, x + h / 2 * v)
        x = x + h * v
    return x


def assert_same(out, expected, bound=1e-10):
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= bound * expected.abs().max()
