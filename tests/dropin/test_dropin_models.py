"""Patched models compute what they did: within float32's rounding, and in 16 bits no further from
the truth than before. And docs/coverage.md says what is replaced in them."""

import pytest
import torch
from models import MODELS, cast, make, output, to_dtype
from models.inputs import grid, image
from torch import nn, randn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from write_coverage import COLUMNS, MAIN, PAGE, CountAttentions, head, line, parsed, totals

from lumina_kernels.patching import patch, unpatch
from tests.common import DEVICE

# The capture of a model takes a second or two, again for each dtype: in 16 bits only the main ones
# and those that round in a way of their own. These keep or compute parts of themselves in float32,
# choose experts, or are written by hand.
BFLOAT16 = (
    *MAIN, "nucleus", "mochi", "cogview4", "sana_wm", "kandinsky5", "ltx2", "cosmos",
    "original_next_dit", "handwritten",
)  # fmt: skip
FLOAT16 = "lumina_next_shared", "z_image", "flux", "wan"
SIXTEEN = [(n, torch.bfloat16) for n in BFLOAT16] + [(n, torch.float16) for n in FLOAT16]
# Its attentions are bfloat16 also in a float32 model: another last bit of what they are given is
# another bfloat16, so the rule is that of 16 bits.
ROUNDS = ("sana_wm",)
# Its blocks call flex_attention, which cannot be captured.
UNTOUCHED = ("kandinsky6_sr",)
FEW = {
    "lumina_next_shared": lambda: {"hidden_states": image(side=4), "cross_attention_kwargs": {}},
    "lumina2": lambda: {"hidden_states": image(side=4)},
    "z_image": lambda: {
        "x": [randn(4, 1, 4, 4) for _ in range(2)], "cap_feats": [randn(n, 32) for n in (7, 5)]
    },
    "flux": lambda: {"hidden_states": randn(2, 4, 4), "img_ids": grid(1, 2, 2)},
    "sd35": lambda: {"hidden_states": image(side=4)},
    "pixart": lambda: {"hidden_states": image(side=4)},
    "dit": lambda: {"hidden_states": image(side=4)},
    "qwen_image": lambda: {"hidden_states": randn(2, 4, 16), "img_shapes": [[(1, 2, 2)]] * 2},
    "wan": lambda: {"hidden_states": randn(2, 4, 1, 4, 4)},
    "hidream": lambda: {},
}  # fmt: skip


def tensors(model, inputs):
    return [x for x in tree_leaves(model(**inputs)) if isinstance(x, torch.Tensor)]


def flat(xs):
    return torch.cat([x.flatten() for x in xs])


def state(model):
    """What is outside of the numbers: where which parameters are, and of what type modules are."""
    saved = model.state_dict(keep_vars=True)
    where = {name: (x.data_ptr(), x.dtype, id(x)) for name, x in saved.items()}
    return where, [(name, type(module)) for name, module in model.named_modules()]


def error(out, truth):
    return ((out.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


def shallow(name):
    """`make`, with one block of each list whose blocks are alike: those of a longer list run one
    after the other in `test_float32`."""
    model, inputs = make(name)
    for module in list(model.modules()):
        for child, blocks in list(module.named_children()):
            is_list = isinstance(blocks, nn.ModuleList) and child.endswith(("layers", "blocks"))
            if is_list and len({kind(block) for block in blocks}) == 1:
                setattr(module, child, blocks[:1])
    return model, inputs


def kind(block):
    """What blocks that are alike have in common: modules, what attends in them, and sizes."""
    modules = [(n, type(m), type(getattr(m, "processor", None))) for n, m in block.named_modules()]
    return *modules, *((n, x.shape) for n, x in block.state_dict().items())


class WithoutBfloat16(TorchFunctionMode):
    """Casts to bfloat16 that a model has in its code do nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0]
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_float32(name):
    model, inputs = make(name)
    with CountAttentions() as count:
        want = tensors(model, inputs)
    with WithoutBfloat16():
        truth = output(model, inputs)
    before = state(model)
    report = patch(model)
    got = tensors(model, inputs)
    assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in want]
    assert state(model) == before
    assert report.fused > 0 or name in UNTOUCHED
    got, want = flat(got), flat(want)
    if name in ROUNDS:
        assert 1e-4 < error(want, truth) < 1e-2
        assert error(got, truth) <= 1.15 * error(want, truth)
    else:
        assert ((got - want).abs().max() / want.square().mean().sqrt()).item() <= 2e-5
    if PAGE.read_text().startswith(head()):
        assert line(name, model, report, count.calls) in PAGE.read_text().splitlines()
    unpatch(model)
    assert state(model) == before
    assert torch.equal(output(model, inputs), want)


@pytest.mark.parametrize("name, dtype", SIXTEEN)
@torch.no_grad()
def test_sixteen_bits(name, dtype):
    model, inputs = shallow(name)
    model, inputs = to_dtype(model, dtype), cast(inputs, dtype)
    eager = output(model, inputs)
    wide, _ = shallow(name)
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    truth = output(wide, cast(inputs, torch.float32)).double()
    report = patch(model)
    got = output(model, inputs)
    assert report.fused > 0 and got.dtype == eager.dtype
    assert error(got, truth) <= 1.15 * error(eager, truth)


@pytest.mark.parametrize("name", MAIN)
@torch.no_grad()
def test_triton(name):
    """Few tokens: its interpreter takes milliseconds for each program."""
    model, inputs = shallow(name)
    inputs = inputs | FEW[name]()
    inputs = tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, inputs)
    model.to(DEVICE)
    want = output(model, inputs)
    report = patch(model, backend="triton")
    got = output(model, inputs)
    backends = {row["op"]: row["backend"] for row in report.rows()}
    assert set(backends.values()) <= {"triton", "torch"} and backends["gqa_attention"] == "triton"
    assert ((got - want).abs().max() / want.square().mean().sqrt()).item() <= 2e-5


def test_page():
    """The ten main models are whole, and nine in ten of what the others have is replaced."""
    rows = parsed(PAGE.read_text())
    everything = rows.pop("")
    assert [*rows] == [*MODELS]
    assert everything[:-1] == totals(rows.values())
    assert not any(rows[name][-1] for name in MAIN)
    others = totals(row for name, row in rows.items() if name not in MAIN)
    for name, cell in list(zip(COLUMNS, others, strict=True))[:3]:
        fused, found = map(int, cell.split("/"))
        assert fused >= 0.9 * found, name
