"""The loss of flow matching and its times."""

import pytest
import torch

from lumina.training.flow_matching import drawn_times, flow_matching_loss


def test_loss_of_each_picture():
    """A network that returns what it is given shows what that was."""
    x1, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    feats, mask, seen = torch.randn(3, 5, 6), torch.ones(3, 5).bool(), []

    def network(x, *rest):
        seen.extend((x, *rest))
        return 2 * x.bfloat16()

    loss = flow_matching_loss(network, x1, t, noise, feats, mask)
    mixed = [noise[0], 0.25 * x1[1] + 0.75 * noise[1], x1[2]]
    torch.testing.assert_close(seen[0], torch.stack(mixed))
    assert all(a is b for a, b in zip(seen[1:], (t, feats, mask), strict=True))
    expected = [
        (2 * x.bfloat16().float() - (a - b)).square().mean()
        for x, a, b in zip(seen[0], x1, noise, strict=True)
    ]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(expected).item() / 3, rel=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "lognorm"])
def test_times(kind):
    t = drawn_times(4000, kind, -0.5, torch.Generator().manual_seed(0))
    assert torch.equal(t, drawn_times(4000, kind, -0.5, torch.Generator().manual_seed(0)))
    u = t if kind == "uniform" else torch.special.ndtr(torch.logit(t) + 0.5)
    assert all(abs(n - 400) < 90 for n in torch.histc(u, 10, 0, 1).tolist())
