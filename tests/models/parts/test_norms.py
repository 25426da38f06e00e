"""A norm of Next-DiT is a module: whatever is done to one has the effect that it has on the same
norm of the reference, which calls all its norms."""

import pytest
import torch
from networks import IMAGE, inputs, pair
from torch import nn
from torch.nn.utils import parametrize, prune

from lumina.models.next_dit import model as next_dit
from lumina.models.parts import norms

NAMES = (
    "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "attention_y_norm",
    "attention.q_norm", "attention.k_norm", "attention.ky_norm",
)  # fmt: skip


def doubled(z):
    return 2 * z


def ramped(z):
    """No norm undoes this."""
    return z * torch.linspace(0.5, 2, z.shape[-1], dtype=z.dtype, device=z.device)


class Wrapper(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.factor = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, x):
        return self.factor * self.base(x)


class Ramp(nn.Module):
    def forward(self, weight):
        return ramped(weight)


def register_again(norm):
    weight = norm.weight
    del norm.weight
    norm.weight = weight  # now after the bias


def replace_forward(norm):
    forward = norm.forward
    norm.forward = lambda x: doubled(forward(x))


def subclass(norm):
    kind = type(norm)
    norm.__class__ = type(
        "Sub", (kind,), {"forward": lambda self, x: doubled(kind.forward(self, x))}
    )


def prune_weight(norm):
    mask = torch.arange(len(norm.weight), device=norm.weight.device) % 3 > 0
    prune.custom_from_mask(norm, "weight", mask)


def set_eps(norm):
    norm.eps = 0.4


# What is done to a norm; a returned module takes its place.
ALTERED = {
    "registered again": register_again,
    "wrapper": Wrapper,
    "sequential": lambda norm: nn.Sequential(norm, Ramp()),
    "forward hook": lambda norm: (
        norm.register_forward_hook(lambda m, args, out: doubled(out)) and None
    ),
    "forward pre-hook": lambda norm: (
        norm.register_forward_pre_hook(lambda m, args: (ramped(args[0]),)) and None
    ),
    "backward hook": lambda norm: (
        norm.register_full_backward_hook(lambda m, grads, _: tuple(map(doubled, grads))) and None
    ),
    "backward pre-hook": lambda norm: (
        norm.register_full_backward_pre_hook(lambda m, grads: tuple(map(doubled, grads))) and None
    ),
    "parametrization": lambda norm: (
        parametrize.register_parametrization(norm, "weight", Ramp()) and None
    ),
    "pruning": prune_weight,
    "replaced forward": replace_forward,
    "subclass": subclass,
    "epsilon": set_eps,
    "plain tensor": lambda norm: (
        (
            setattr(norm, "flat", norm.weight),
            delattr(norm, "weight"),
            setattr(norm, "weight", ramped(norm.flat)),
        )
        and None
    ),
}


def alter(network, name, change):
    """Apply `change` to this norm of the first block."""
    parent, _, leaf = f"layers.0.{name}".rpartition(".")
    parent = network.get_submodule(parent)
    replacement = change(getattr(parent, leaf))
    if isinstance(replacement, nn.Module):
        setattr(parent, leaf, replacement)


def outputs_and_gradients(network, arguments):
    x, t, feats, mask = arguments
    x, feats = x.detach().requires_grad_(), feats.detach().requires_grad_()
    out = network(x, t, feats, mask)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    leaves = {"x": x, "feats": feats, **dict(network.named_parameters())}
    grads = torch.autograd.grad(
        (out * weight.view_as(out)).sum(), list(leaves.values()), allow_unused=True
    )
    return {"out": out} | dict(zip(leaves, grads, strict=True))


def assert_as_in_the_reference(names, change):
    networks, arguments = pair(dim=48), inputs(*IMAGE)
    plain = outputs_and_gradients(networks[0], arguments)
    for network in networks:
        for name in names:
            alter(network, name, ALTERED[change])
    ours, theirs = (outputs_and_gradients(network, arguments) for network in networks)
    assert ours.keys() == theirs.keys()
    largest = max(float(grad.abs().max()) for grad in theirs.values() if grad is not None)
    for key, expected in theirs.items():
        if expected is not None:  # pad_token has none there
            torch.testing.assert_close(ours[key], expected, rtol=1e-9, atol=1e-12 * largest)
    changed = any(not torch.equal(ours[k], plain[k]) for k in plain if k in ours)
    assert changed == (change != "registered again")


@pytest.mark.parametrize("change", ALTERED)
def test_all_altered_as_in_the_reference(change):
    assert_as_in_the_reference(NAMES, change)


@pytest.mark.parametrize("name", NAMES)
def test_one_altered_as_in_the_reference(name):
    """Called, while its neighbour in a fused op is not altered."""
    assert_as_in_the_reference([name], "forward hook")


@pytest.mark.parametrize("adapter", ["LN tuning", "modules_to_save"])
def test_adapters_of_peft(adapter):
    """The trained copy of a norm is the one that counts, until it is switched off."""
    peft = pytest.importorskip("peft")
    ours, arguments = pair(dim=48)[0], inputs(*IMAGE)
    expected = ours(*arguments)
    leaves = [name.rpartition(".")[2] for name in NAMES]
    if adapter == "LN tuning":
        config = peft.LNTuningConfig(target_modules=leaves)
    else:
        config = peft.LoraConfig(target_modules=["w1"], modules_to_save=leaves)
    tuned = peft.get_peft_model(ours, config)
    # A wrapped norm is called, not fused: the same up to rounding.
    torch.testing.assert_close(tuned(*arguments), expected, rtol=1e-9, atol=1e-11)
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad and "norm" in n}
    assert len(trained) == 2 * (5 + 3 * 2)  # two blocks, five RMSNorms and three LayerNorms
    grads = torch.autograd.grad(tuned(*arguments).sum(), list(trained.values()))
    zero = [n for n, grad in zip(trained, grads, strict=True) if not grad.abs().max() > 1e-12]
    assert all("ky_norm" in n and "bias" in n for n in zero)
    last = expected
    for name in NAMES:
        with torch.no_grad():
            for n, parameter in trained.items():
                if name.rpartition(".")[2] in n.split("."):
                    parameter.copy_(ramped(parameter))
            now = tuned(*arguments)
            assert (now - last).abs().max() > 1e-6, name
            last = now
    with torch.no_grad(), tuned.disable_adapter():
        torch.testing.assert_close(tuned(*arguments), expected, rtol=1e-9, atol=1e-11)


def test_layerwise_casting_of_diffusers():
    """Its hook casts the parameters back to 8 bits when a call ends, even one that only asks for
    them. The reference's parameters are rounded to 8 bits once."""
    hooks = pytest.importorskip("diffusers.hooks")
    (ours, reference), arguments, low = pair(dim=48), inputs(*IMAGE), torch.float8_e4m3fn
    with torch.no_grad():
        last = reference(*arguments)
        for name in NAMES:
            norm = ours.get_submodule(f"layers.0.{name}")
            hooks.apply_layerwise_casting_hook(norm, low, norm.weight.dtype, non_blocking=False)
            for parameter in reference.get_submodule(f"layers.0.{name}").parameters():
                parameter.copy_(parameter.to(low))
            expected = reference(*arguments)
            torch.testing.assert_close(ours(*arguments), expected, rtol=1e-9, atol=1e-11)
            assert norm.weight.dtype == low and not torch.equal(expected, last), name
            last = expected


def test_untouched_norms_are_fused(monkeypatch):
    """None of a whole network is called, on the way to the velocity or to the gradients."""
    called = []
    forward = norms._Norm.forward
    monkeypatch.setattr(
        norms._Norm, "forward", lambda self, *args: called.append(self) or forward(self, *args)
    )
    ours, arguments = pair(dim=48)[0], inputs(*IMAGE)
    outputs_and_gradients(ours, arguments)
    assert not called
    ours.layers[1].ffn_norm2.register_forward_hook(lambda *args: None)
    ours(*arguments)
    assert called == [ours.layers[1].ffn_norm2]


@pytest.mark.parametrize(
    "kind, torchs", [(norms.RMSNorm, nn.RMSNorm), (norms.LayerNorm, nn.LayerNorm)]
)
def test_a_norm_alone_is_that_of_torch(kind, torchs):
    norm, x = kind(6, 1e-3), torch.randn(2, 5, 6)
    nn.init.normal_(norm.weight)
    expected = torchs(6, 1e-3)
    expected.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), expected(x))
    with torch.autocast("cpu", torch.bfloat16):  # which computes a LayerNorm in float32
        assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_blocks_read_no_others_parameters():
    """A block whose neighbours have lost theirs computes what it did."""
    ours, (x, t, feats, mask) = pair(dim=48, n_layers=3)[0], inputs(*IMAGE)
    seen = {}
    hook = ours.layers[1].register_forward_hook(
        lambda m, args, out: seen.update(args=args, out=out)
    )
    with torch.no_grad():
        ours(x, t, feats, mask)
        hook.remove()
        for other in (ours.layers[0], ours.layers[2], ours.final_layer):
            for parameter in other.parameters():
                parameter.fill_(torch.nan)
        again = ours.layers[1](*seen["args"])
    assert all(torch.equal(a, b) for a, b in zip(again, seen["out"], strict=True))
    assert next_dit.TransformerBlock is type(ours.layers[1])
