"""The node of examples/comfyui/. ComfyUI is no package that could be installed: a stand-in has the
part of its interface that the node uses."""

import sys
from functools import partial
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[2]


class ModelPatcher:
    def __init__(self, options):
        self.model_options = {"transformer_options": options}

    def clone(self):
        return ModelPatcher(self.model_options["transformer_options"])


def wrap_attn(function):
    def attention(*args, **kwargs):
        options = kwargs.get("transformer_options") or {}
        replaced = (
            "optimized_attention_override" in options and "_inside_attn_wrapper" not in kwargs
        )
        kwargs["_inside_attn_wrapper"] = True
        if replaced:
            return options["optimized_attention_override"](function, *args, **kwargs)
        return function(*args, **kwargs)

    return attention


@pytest.fixture
def comfy(monkeypatch):
    """The stand-in's attention module, with what was `called` there and is `registered`, and the
    `node` of the example."""
    names = "comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention"
    modules = [ModuleType(name) for name in names]
    for parent, child in zip(modules, modules[1:], strict=False):
        setattr(parent, child.__name__.rpartition(".")[2], child)
    for each in modules:
        monkeypatch.setitem(sys.modules, each.__name__, each)
    attention = modules[-1]
    attention.called, attention.registered = [], {}

    @wrap_attn
    def attention_pytorch(
        q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
        skip_output_reshape=False, **kwargs,
    ):  # fmt: skip
        attention.called.append(kwargs)
        if not skip_reshape:
            K = q.shape[-1] // heads
            q, k, v = (x.unflatten(-1, (-1, K)).transpose(1, 2) for x in (q, k, v))
        while mask is not None and mask.ndim < 4:
            mask = mask[None] if mask.ndim == 2 else mask[:, None]
        gqa = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
        out = scaled_dot_product_attention(q, k, v, mask, **gqa)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    attention.wrap_attn, attention.attention_pytorch = wrap_attn, attention_pytorch
    attention.register_attention_function = attention.registered.setdefault
    path = ROOT / "examples/comfyui/__init__.py"
    spec = util.spec_from_file_location("lumina_comfyui", path)
    attention.node = util.module_from_spec(spec)
    spec.loader.exec_module(attention.node)
    return attention


MASKS = {
    "none": lambda: None,
    "keys": lambda: torch.rand(2, 1, 1, 9) < 0.6,
    "bool, (B, L, L_kv)": lambda: torch.rand(2, 5, 9) < 0.6,
    "bool, (B, H, L, L_kv)": lambda: torch.rand(2, 4, 5, 9) < 0.6,
    "float, (L, L_kv)": lambda: torch.randn(5, 9),
    "float, (B, L, L_kv)": lambda: torch.randn(2, 5, 9),
    "float, (B, 1, L_kv)": lambda: torch.randn(2, 1, 9),
    "float, (1, H, L, L_kv)": lambda: torch.randn(1, 4, 5, 9),
}


@pytest.mark.parametrize("skip_output_reshape", (False, True))
@pytest.mark.parametrize("skip_reshape", (False, True))
@pytest.mark.parametrize("name", MASKS)
def test_layouts_and_masks(name, skip_reshape, skip_output_reshape, comfy):
    qkv, mask = [torch.randn(2, n, 4 * 24) for n in (5, 9, 9)], MASKS[name]()
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
    if skip_reshape:
        qkv = [x.unflatten(-1, (4, 24)).transpose(1, 2) for x in qkv]
    layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    model = ModelPatcher({"cond_or_uncond": [0]})
    attend = partial(comfy.attention_pytorch, *qkv, 4, mask, **layout)
    want = attend(transformer_options=model.model_options["transformer_options"])
    assert len(comfy.called) == 1
    (patched,) = comfy.node.NODE_CLASS_MAPPINGS["LuminaAttention"]().patch(model)
    options = patched.model_options["transformer_options"]
    got = attend(transformer_options=options, low_precision_attention=False)
    assert len(comfy.called) == 1, "ComfyUI's own attention ran"
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(comfy.registered["lumina"](*qkv, 4, mask=mask, **layout), want)
    assert model.model_options == {"transformer_options": {"cond_or_uncond": [0]}}
    assert options["cond_or_uncond"] == [0]


def test_grouped_heads_and_scale(comfy):
    q, k, v = (torch.randn(2, n, h * 24) for n, h in ((5, 4), (9, 2), (9, 2)))
    more = {"scale": 0.3, "enable_gqa": True}
    want = comfy.attention_pytorch(q, k, v, 4, **more)
    torch.testing.assert_close(comfy.registered["lumina"](q, k, v, 4, **more), want)
    assert len(comfy.called) == 1


@pytest.mark.parametrize("case", ("2-D bool", "keyword", "head_dim", "value's head_dim", "dtypes"))
def test_leaves_the_rest(case, comfy):
    q, k, v = (torch.randn(2, 4, 5, 288 if case == "head_dim" else 24) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if case == "2-D bool" else None
    more = {"temperature": 2.0} if case == "keyword" else {}
    if case == "value's head_dim":
        v = v[..., :8]
    if case == "dtypes":
        with pytest.raises(RuntimeError, match="dtype"):  # PyTorch's, as without the node
            comfy.registered["lumina"](q, k, v.double(), 4, skip_reshape=True)
        return
    got = comfy.registered["lumina"](q, k, v, 4, mask=mask, skip_reshape=True, **more)
    assert len(comfy.called) == 1 and comfy.called[0].items() >= more.items()
    torch.testing.assert_close(
        got, scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    )


def test_keeps_the_override_that_was_there(comfy):
    def doubled(func, q, *args, **kwargs):
        return func(2 * q, *args, **kwargs)

    q, k, v = torch.randn(3, 2, 5, 96)
    model = ModelPatcher({"optimized_attention_override": doubled})
    want = comfy.attention_pytorch(q, k, v, 4, **model.model_options)
    (patched,) = comfy.node.LuminaAttention().patch(model)
    torch.testing.assert_close(comfy.attention_pytorch(q, k, v, 4, **patched.model_options), want)
    assert len(comfy.called) == 1
