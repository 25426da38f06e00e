"""Attention under the name "lumina" in transformers: the numbers of "eager" and "sdpa"."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from lumina_kernels import attention_interface
from lumina_kernels.attention_interface import lumina_attention

ROOT = Path(__file__).parents[2]
SMALL = dict(
    vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=24, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
DECODERS = {
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, sliding_window=4, attn_logit_softcapping=2.0)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, sliding_window=4)
    ),
}
PADDING = {"none": None, "left": slice(0, 4), "right": slice(7, 11)}


def make(build, dtype=torch.float32):
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model.eval().to(dtype)


def tokens(padding):
    ids = torch.arange(1, 23).view(2, 11) * 7 % 63 + 1
    mask = torch.ones_like(ids)
    if PADDING[padding] is not None:
        mask[0, PADDING[padding]] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def run(model, name, *outputs, **inputs):
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def error(out, truth):
    return ((out.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.fixture
def calls(monkeypatch):
    """The `key_mask` and `bias` of every call of the op, once "lumina" is registered."""
    attention_interface.register()
    seen, op = [], attention_interface.gqa_attention

    def spy(q, k, v, key_mask, scale, bias):
        seen.append((key_mask, bias))
        return op(q, k, v, key_mask, scale, bias=bias)

    monkeypatch.setattr(attention_interface, "gqa_attention", spy)
    return seen


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, padding, calls):
    model, inputs = make(DECODERS[name]), tokens(padding)
    want = run(model, "eager", **inputs)
    got = run(model, "lumina", **inputs)
    # The op takes both layers where there is a mask of its own, and no softcap.
    masked = padding != "none" or name == "mistral"
    assert len(calls) == (2 if masked and name != "gemma2" else 0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if name != "gemma2":
        torch.testing.assert_close(got, run(model, "sdpa", **inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_in_bfloat16(name, calls):
    model, inputs = make(DECODERS[name], torch.bfloat16), tokens("left")
    truth = run(make(DECODERS[name], torch.bfloat16).float(), "eager", **inputs).double()
    got, eager = run(model, "lumina", **inputs), run(model, "eager", **inputs)
    assert got.dtype == torch.bfloat16 and error(got, truth) <= 1.15 * error(eager, truth)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("name", DECODERS)
def test_generation(name, cache, calls):
    model, inputs = make(DECODERS[name]), tokens("left")
    found = []
    for attention in ("eager", "lumina"):
        model.set_attn_implementation(attention)
        found.append(
            model.generate(
                **inputs, max_new_tokens=8, do_sample=False, cache_implementation=cache,
                output_logits=True, return_dict_in_generate=True,
            )
        )  # fmt: skip
    eager, ours = found
    assert torch.equal(ours.sequences, eager.sequences)
    torch.testing.assert_close(ours.logits, eager.logits, atol=2e-5, rtol=1e-5)
    assert len(calls) == (0 if name == "gemma2" else 16)  # two layers, eight tokens


def bert():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("build", (bert, t5))
def test_encoders(build, padding, calls):
    model, inputs = make(build), tokens(padding)
    if build is t5:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    want, got = run(model, "eager", **inputs), run(model, "lumina", **inputs)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    key_masks = [key_mask for key_mask, _ in calls if key_mask is not None]
    # Two layers, and in T5 the two of the decoder that look at the encoder's tokens.
    assert len(key_masks) == (2 if build is bert else 4)
    assert all(torch.equal(mask, inputs["attention_mask"].bool()) for mask in key_masks)


def test_siglip(calls):
    config = transformers.SiglipVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model, pixels = make(partial(transformers.SiglipVisionModel, config)), torch.randn(2, 3, 32, 32)
    want = model(pixels).last_hidden_state
    model.set_attn_implementation("lumina")
    torch.testing.assert_close(model(pixels).last_hidden_state, want, atol=1e-5, rtol=1e-5)
    assert calls and all(call == (None, None) for call in calls)


def test_gradients(calls):
    model, inputs = make(DECODERS["qwen3"]), tokens("right")
    grads = []
    for attention in ("sdpa", "lumina"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(
            inputs["attention_mask"] == 0, -100
        )).loss  # fmt: skip
        loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(calls) == 2
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("offset", (0, 2))
@pytest.mark.parametrize("length", (7, 11))  # of the padding mask, for ten keys
def test_key_masks_are_the_row_of_a_whole_mask(length, offset):
    padding = torch.rand(2, length) < 0.5
    mask = partial(
        attention_interface.lumina_mask, batch_size=2, q_length=4, kv_length=10 - offset,
        kv_offset=offset, mask_function=bidirectional_mask_function, attention_mask=padding,
    )  # fmt: skip
    keys, whole = (mask(allow_is_bidirectional_skip=skip) for skip in (True, False))
    assert keys.shape == (2, 1, 1, 10 - offset) and whole.shape == (2, 1, 4, 10 - offset)
    assert torch.equal(keys.expand_as(whole), whole)
    causal = mask(mask_function=causal_mask_function, allow_is_bidirectional_skip=True)
    assert torch.equal(causal, whole & causal) and not torch.equal(causal, whole)


def heads(*lengths, K=24):
    """query, key and value of 4, 2 and 2 heads."""
    return [torch.randn(2, h, n, K) for h, n in zip((4, 2, 2), lengths, strict=True)]


def truth(query, key, value, mask, scale=None):
    out = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def module(is_causal=False):
    return SimpleNamespace(is_causal=is_causal, num_key_value_groups=2, training=True)


@pytest.mark.parametrize("shape", ((2, 1, 1, 9), (1, 1, 5, 9), (2, 4, 5, 9), (1, 4, 1, 9)))
@pytest.mark.parametrize("kind", ("bool", "float"))
def test_masks(shape, kind):
    qkv = heads(5, 9, 9)
    mask = torch.rand(shape) < 0.6 if kind == "bool" else torch.randn(shape)
    mask[..., 0] = 1
    bias = torch.randn(1, 4, 5, 9)
    out, weights = lumina_attention(module(True), *qkv, mask, scaling=0.3)
    torch.testing.assert_close(out, truth(*qkv, mask, 0.3))
    assert weights is None and out.is_contiguous()
    both = bias.masked_fill(~mask, -torch.inf) if kind == "bool" else bias + mask
    out, _ = lumina_attention(module(), *qkv, mask, position_bias=bias)
    torch.testing.assert_close(out, truth(*qkv, both))


@pytest.mark.parametrize("window", (None, 3))
@pytest.mark.parametrize("softcap", (None, 0.8))
@pytest.mark.parametrize("L_kv", (6, 9))  # 9: a static cache with room for three more
def test_causal_without_a_mask(L_kv, softcap, window):
    query, key, value = heads(6, L_kv, L_kv)
    row, column = torch.arange(6)[:, None], torch.arange(L_kv)
    seen = (column <= row) & (column > row - (window or 99))
    scores = query @ key.repeat_interleave(2, 1).mT * 24**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    out, _ = lumina_attention(
        module(True), query, key, value, None, sliding_window=window, softcap=softcap
    )
    torch.testing.assert_close(out, want.transpose(1, 2))


@pytest.mark.parametrize("softcap", (None, 0.8))
def test_a_single_query_sees_the_whole_cache(softcap, calls):
    query, key, value = heads(1, 9, 9)
    scores = query @ key.repeat_interleave(2, 1).mT * 24**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    want = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    out, _ = lumina_attention(module(True), query, key, value, None, softcap=softcap)
    torch.testing.assert_close(out, want.transpose(1, 2))
    assert len(calls) == (softcap is None)


@pytest.mark.parametrize("kind", ("bool", "float", "keys", None))
def test_softcap_masks_like_eager(kind):
    qkv = heads(5, 5, 5)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[0, ..., :2] = False  # two rows see nothing
    mask = {"bool": mask, "float": mask.log(), "keys": mask[:, :, -1:], None: None}[kind]
    out, _ = lumina_attention(module(), *qkv, mask, softcap=0.8)
    scores = 0.8 * (qkv[0] @ qkv[1].repeat_interleave(2, 1).mT * 24**-0.5 / 0.8).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask if kind != "float" else mask < 0, -1e30)
    want = scores.softmax(-1) @ qkv[2].repeat_interleave(2, 1)
    torch.testing.assert_close(out, want.transpose(1, 2))


@pytest.mark.parametrize("dropout, K, V", ((0.4, 24, 24), (0.0, 24, 16), (0.0, 264, 264)))
def test_what_the_op_lacks_is_left_to_sdpa(dropout, K, V, calls):
    query, key, _ = heads(5, 9, 9, K=K)
    value = heads(5, 9, 9, K=V)[2]
    mask, bias = torch.rand(2, 1, 1, 9) < 0.7, torch.randn(1, 4, 5, 9)
    mask[..., 0] = True
    torch.manual_seed(3)
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    both = bias.masked_fill(~mask, -torch.inf)
    want = scaled_dot_product_attention(query, *repeated, both, dropout).transpose(1, 2)
    torch.manual_seed(3)
    out, _ = lumina_attention(
        module(), query, key, value, mask, dropout=dropout, position_bias=bias
    )
    torch.testing.assert_close(out, want)
    assert not calls


def test_autocast_casts_as_for_sdpa():
    query, key, value = heads(5, 9, 9)
    mask = torch.rand(2, 1, 1, 9) < 0.9
    want, _ = lumina_attention(module(), *(x.bfloat16() for x in (query, key, value)), mask)
    with torch.autocast("cpu", torch.bfloat16):  # rotations leave float32, projections do not
        out, _ = lumina_attention(module(), query, key, value.bfloat16(), mask)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)


def test_refusals():
    qkv = heads(5, 5, 5)
    with pytest.raises(NotImplementedError, match="attention sinks"):
        lumina_attention(module(), *qkv, None, s_aux=torch.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(B, H, L, L_kv\), got \(2, 5\)"):
        lumina_attention(module(), *qkv, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="bias must be float.*int64"):
        lumina_attention(module(), *qkv, torch.ones(2, 1, 5, 5, dtype=torch.int64))


def test_compiles_whole():
    compiled = torch.compile(lumina_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for L in (5, 7):
        qkv, mask = heads(L, L, L), torch.ones(2, 1, L, L, dtype=torch.bool).tril()
        torch.testing.assert_close(compiled(module(), *qkv, mask)[0], truth(*qkv, mask))


def test_transformers_is_not_imported():
    program = "import lumina_kernels, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
