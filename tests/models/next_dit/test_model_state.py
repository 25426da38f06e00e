"""The state dict of lumina.NextDiT, its initialisation, and what it refuses."""

import copy
import io

import pytest
import torch
from common import DEVICE
from networks import AUDIO, IMAGE, VIDEO, cast, config, inputs, pair, randn
from torch import nn

from lumina import PRESETS as ALL
from lumina import NextDiT
from lumina.models.families import FAMILIES, name_of
from lumina.models.next_dit.config import PRESETS

LAYER = """attention.wq.weight attention.wk.weight attention.wv.weight attention.wo.weight
attention.wk_y.weight attention.wv_y.weight attention.gate attention.q_norm.weight
attention.q_norm.bias attention.k_norm.weight attention.k_norm.bias attention.ky_norm.weight
attention.ky_norm.bias feed_forward.w1.weight feed_forward.w2.weight feed_forward.w3.weight
attention_norm1.weight attention_norm2.weight ffn_norm1.weight ffn_norm2.weight
attention_y_norm.weight adaLN_modulation.1.weight adaLN_modulation.1.bias""".split()
OUTSIDE = """pad_token x_embedder.weight x_embedder.bias t_embedder.mlp.0.weight
t_embedder.mlp.0.bias t_embedder.mlp.2.weight t_embedder.mlp.2.bias cap_embedder.0.weight
cap_embedder.0.bias cap_embedder.1.weight cap_embedder.1.bias final_layer.linear.weight
final_layer.linear.bias final_layer.adaLN_modulation.1.weight
final_layer.adaLN_modulation.1.bias""".split()
LOST = "layers.1.adaLN_modulation.1.weight"


@pytest.mark.parametrize("qk_norm", [True, False])
def test_names_are_those_of_the_released_checkpoint(qk_norm):
    names = {*OUTSIDE, *(f"layers.{i}.{name}" for i in range(2) for name in LAYER)}
    if not qk_norm:
        names = {name for name in names if not any(k in name for k in ("q_norm", "k_norm", "ky_"))}
    ours, theirs = (m.state_dict() for m in pair(qk_norm=qk_norm))
    assert ours.keys() == theirs.keys() == names
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_released_sizes():
    with torch.device("meta"):
        count = {n: sum(p.numel() for p in NextDiT(c).parameters()) for n, c in PRESETS.items()}
    assert count["2b-gqa"] == 1_627_386_400
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in FAMILIES[name_of(config)].network(config).parameters())
            for name, config in ALL.items()
        }
    assert {name: sizes[name] for name in count} == count
    assert [round(sizes[name] / 1e9, 3) for name in ("lumina2", "z-image")] == [2.61, 6.155]
    assert round(count["2b"] / 1e9, 3) == 1.989


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k].to(a[k])) for k in a)


def test_state_dict_survives():
    ours, theirs = pair()
    expected = theirs.state_dict()
    assert same_state(expected, copy.deepcopy(ours).state_dict())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    assert same_state(expected, torch.load(file, weights_only=True))
    half = copy.deepcopy(ours).to(torch.bfloat16).state_dict()
    assert all(half[name].dtype == torch.bfloat16 for name in half)
    assert all(torch.equal(half[name], expected[name].bfloat16()) for name in half)

    fresh = NextDiT(ours.config).to(DEVICE, torch.float64)
    nn.ModuleDict({"network": fresh}).load_state_dict(nn.ModuleDict({"network": ours}).state_dict())
    assert same_state(expected, fresh.state_dict())
    with torch.device("meta"):
        empty = NextDiT(ours.config)
    empty.load_state_dict(expected, assign=True)
    assert same_state(expected, empty.state_dict())


def test_the_state_dict_names_the_parameters():
    """What functional_call, PEFT and FSDP rely on."""
    ours, theirs = pair()
    assert {name for name, _ in ours.named_parameters()} == ours.state_dict().keys()
    fresh = NextDiT(ours.config).to(DEVICE, torch.float64)
    arguments = inputs(*IMAGE)
    out = torch.func.functional_call(fresh, theirs.state_dict(), arguments)
    assert torch.equal(out, ours(*arguments)) and not fresh(*arguments).any()


def test_loading_names_what_does_not_fit():
    ours, theirs = pair()
    before = copy.deepcopy(ours.state_dict())

    def load(change, strict=True):
        state = {name: value.clone() for name, value in theirs.state_dict().items()}
        change(state)
        return ours.load_state_dict(state, strict=strict)

    missing = rf'Missing key.*: "{LOST}"\. '
    with pytest.raises(RuntimeError, match=missing) as error:
        load(lambda state: state.pop(LOST))
    assert "Unexpected" not in str(error.value)
    with pytest.raises(RuntimeError, match=r"size mismatch for layers.1.adaLN.*\[5\].*\[576\]"):
        load(lambda state: state.update({LOST[:-6] + "bias": torch.zeros(5)}))
    with pytest.raises(RuntimeError, match='Unexpected key.*"layers.2.adaLN_modulation.1.weight"'):
        load(lambda state: state.update({LOST.replace("1", "2", 1): state[LOST]}))
    with pytest.raises(RuntimeError, match="Missing.*final_layer.adaLN_modulation.1.bias"):
        ours.load_state_dict({})
    assert same_state(before, ours.state_dict())

    def partial(state):
        for value in state.values():
            value.zero_()
        del state[LOST]

    assert load(partial, strict=False).missing_keys == [LOST]
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]) if name == LOST else not value.any(), name


def test_reset_initialises_everything():
    """On memory that holds NaN, as `to_empty` leaves it; a new network gives 0."""
    with torch.device("meta"):
        ours = NextDiT(config(n_heads=4))
    ours = ours.to_empty(device=DEVICE)
    with torch.no_grad():
        for p in ours.parameters():
            p.fill_(torch.nan)
    ours.reset_parameters()
    x, t, feats, mask = cast(inputs(*IMAGE), torch.float32)
    assert not ours(x, t, feats, mask).any()
    state = ours.state_dict()
    zero = {name for name, value in state.items() if not value.any()}
    assert all(name in zero for name in state if name.endswith(".bias") or "adaLN" in name)
    assert {"layers.0.attention.gate", "final_layer.linear.weight", "cap_embedder.1.weight"} < zero
    assert all((state[n] == 1).all() for n in state if "norm" in n and n.endswith("weight"))
    for name, std in (("t_embedder.mlp.2.weight", 0.02), ("pad_token", 0.02)):
        assert 0.7 * std < state[name].std() < 1.4 * std
    fan = sum(state["layers.0.feed_forward.w1.weight"].shape)  # xavier
    assert abs(state["layers.0.feed_forward.w1.weight"].std() * (fan / 2) ** 0.5 - 1) < 0.05


def test_errors():
    (ours, _), (x, t, feats, mask) = pair(), inputs(*IMAGE)
    good = dict(x=x, t=t, cap_feats=feats, cap_mask=mask)

    def refuse(match, **changed):
        with pytest.raises(ValueError, match=match):
            ours(**{**good, **changed})

    refuse(r"x must be \(B, C, H, W\) with C = 3.*got shape \(3, 4, 4, 6\)", x=randn(3, 4, 4, 6))
    refuse(r"positive multiples of the patch .*got \(3, 3, 5, 6\)", x=randn(3, 3, 5, 6))
    refuse(r"positive multiples of the patch .*got \(3, 3, 4, 0\)", x=randn(3, 3, 4, 0))
    refuse(r"x must be .* axes \('h', 'w'\), got shape \(3, 3, 1, 4, 6\)", x=x[:, :, None])
    refuse(r"x must be .*got shape \(1, 3, 4\)", x=[x[0], x[1, :, :, 0], x[2]])
    refuse(r"t must have shape \(3,\).*got \(2,\)", t=t[:2])
    refuse(r"t must have shape \(3,\).*got \(\)", t=t[0])
    refuse(r"t must have shape \(3,\).*got \(3, 1\)", t=t[:, None])
    refuse(
        r"there must be 2 captions for 2 images, or a multiple, got \(2,\) and 3", x=x[:2], t=t[:2]
    )
    refuse(r"cap_feats must have shape \(B, T, 24\), got \(3, 5, 23\)", cap_feats=feats[..., 1:])
    refuse(r"cap_feats must have shape \(B, T, 24\), got \(5, 24\)", cap_feats=feats[0])
    refuse(
        r"cap_mask must be bool of shape \(3, 5\) or \(3, L, 5\), got torch.int64",
        cap_mask=mask.long(),
    )
    refuse(r"cap_mask must be bool of shape \(3, 5\).*got.*\(3, 4\)", cap_mask=mask[:, 1:])
    refuse("base_seqlen must be at least 2 tokens, got 1", base_seqlen=1)
    refuse("x must hold at least one image", x=[], t=t[:0], cap_feats=feats[:0], cap_mask=mask[:0])
    for changes, size in ((AUDIO, (5, 4, 4)), (VIDEO, (3, 4))):
        with pytest.raises(ValueError, match="x must be"):
            pair(**changes)[0](randn(3, *size), t, feats, mask)
    with pytest.raises(ValueError, match="backend 'nonsense'"):
        NextDiT(config(), backend="nonsense").to(DEVICE, torch.float64)(x, t, feats, mask)
