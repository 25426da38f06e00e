"""Patched models go on with what people do to models: adapters, quantisation, caches, offloading,
casting, copies, training, other sizes. Each time the ops run and the numbers are those of the
model as it was."""

import copy
import io

import accelerate
import pytest
import torch
from checks import Small, deviation, gradients, largest_deviation, run
from diffusers import FirstBlockCacheConfig
from models import make, output
from models.inputs import text, video
from peft import LoraConfig
from torch import nn

from lumina_kernels import patch, unpatch

LIMIT = 2e-5
WAN, PRIOR = 20, 8  # calls of ops in a forward of the models of these names
LORA = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)


@torch.no_grad()
def test_lora_after_the_first_forward():
    model, inputs = make("wan")
    report = patch(model)
    plain, ops = run(model, inputs, report)
    model.add_adapter(LORA)
    got, with_lora = run(model, inputs, report)
    model.disable_adapters()
    disabled, _ = run(model, inputs, report)
    model.enable_adapters()
    unpatch(model)
    want = output(model, inputs)
    assert deviation(plain, want) > 0.1 and deviation(got, want) <= LIMIT
    assert deviation(disabled, plain) <= LIMIT
    assert with_lora == ops == WAN and not report.unfused


@torch.no_grad()
def test_lora_before_patch():
    model, inputs = make("wan")
    model.add_adapter(LORA)
    want = output(model, inputs)
    got, ops = run(model, inputs, patch(model))
    assert deviation(got, want) <= LIMIT and ops == WAN


class Int8Linear(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), None) * self.scale.T + self.bias


@torch.no_grad()
def test_int8_linears():
    model, inputs = make("wan")
    float32 = output(model, inputs)
    for module in list(model.blocks.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    want = output(model, inputs)
    got, ops = run(model, inputs, patch(model))
    assert 1e-3 < deviation(float32, want) < 0.2
    assert deviation(got, want) <= LIMIT and ops == WAN


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*quantized")
@torch.no_grad()
def test_dynamically_quantised_linears():
    model, inputs = make("prior")
    torch.ao.quantization.quantize_dynamic(model.transformer_blocks, {nn.Linear}, inplace=True)
    want = output(model, inputs)
    got, ops = run(model, inputs, patch(model))
    assert deviation(got, want) <= LIMIT and ops == PRIOR


@pytest.mark.parametrize("when", ("before patch", "after a patched forward"))
@torch.no_grad()
def test_first_block_cache(when):
    model, inputs = make("wan")
    steps = [inputs | {"hidden_states": inputs["hidden_states"] * s} for s in (1, 1.0001, 2)]

    def sample():
        model._reset_stateful_cache()
        with model.cache_context("cond"):
            return [run(model, step, report) for step in steps]

    if when == "before patch":
        model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    report = patch(model)
    if when != "before patch":
        assert run(model, inputs, report)[1] == WAN
        model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    got = sample()
    unpatch(model)
    want = sample()
    assert [ops for _, ops in got] == [WAN, WAN // 2, WAN]  # the second: one block
    assert all(deviation(a, b) <= LIMIT for (a, _), (b, _) in zip(got, want, strict=True))


@torch.no_grad()
def test_offloaded_leaves():
    model, inputs = make("prior")
    want = output(model, inputs)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.transformer_blocks[0].attn1.to_q.weight.is_meta
    report = patch(model, backend="cpu")
    for _ in range(2):
        got, ops = run(model, inputs, report)
        assert deviation(got, want) <= LIMIT and ops >= PRIOR
    assert model.transformer_blocks[0].attn1.to_q.weight.is_meta


@torch.no_grad()
def test_leaves_offloaded_after_the_first_forward():
    model, inputs = make("prior")
    report = patch(model)
    want, _ = run(model, inputs, report)
    accelerate.cpu_offload(model, torch.device("cpu"))
    got, ops = run(model, inputs, report)
    assert deviation(got, want) <= LIMIT and ops >= PRIOR


@torch.no_grad()
def test_layerwise_casting():
    model, inputs = make("prior")
    float32 = output(model, inputs)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    want = output(model, inputs)
    got, ops = run(model, inputs, patch(model))
    assert deviation(got, want) <= LIMIT and ops == PRIOR
    assert deviation(float32, want) > 0.01
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@torch.no_grad()
def test_autocast():
    model, inputs = make("wan")
    truth = output(model, inputs)
    report = patch(model)
    assert deviation(run(model, inputs, report)[0], truth) <= LIMIT
    with torch.autocast("cpu", torch.bfloat16):
        got, ops = run(model, inputs, report)
        unpatch(model)
        eager = output(model, inputs)
    error, was = ((x - truth).square().mean().sqrt() for x in (got, eager))
    assert got.dtype == eager.dtype and ops >= 16
    assert 0 < error <= 1.15 * was


@torch.no_grad()
def test_copies_are_unpatched_and_the_model_keeps_its_face():
    model, inputs = make("prior")

    def face():
        names = [type(module).__name__ for module in model.modules()]
        return names, [(k, x.data_ptr()) for k, x in model.state_dict().items()]

    want, before = output(model, inputs), face()
    report = patch(model)
    assert deviation(run(model, inputs, report)[0], want) <= LIMIT
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    assert face() == before
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert type(other) is type(model) and list(other.state_dict()) == list(model.state_dict())
        got, ops = run(other, inputs, report)
        assert torch.equal(got, want) and ops == 0
        assert patch(other) is not report and deviation(output(other, inputs), want) <= LIMIT
    assert run(model, inputs, report)[1] == PRIOR


@pytest.mark.parametrize("name", ("flux", "lumina_next_shared", "wan", "dit", "sd35", "hidream"))
def test_gradients_of_all_parameters(name):
    model, inputs = make(name)
    want = gradients(model, inputs)
    report = patch(model)
    got = gradients(model, inputs)
    assert largest_deviation(got, want) <= 1e-5 and len(got) > 40
    assert report.fused >= 10 and not report.unfused


def test_gradient_checkpointing_from_the_first_step():
    model, inputs = make("wan")
    want = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    model.train()
    report = patch(model)
    for calls in (2 * WAN, 4 * WAN):  # in the forward, and again for the backward
        assert largest_deviation(gradients(model, inputs), want) <= 1e-5
        assert report.fused == calls
    assert len(report.graphs) == 1


@torch.no_grad()
def test_further_sizes_need_no_further_graphs():
    model, inputs = make("wan")
    sizes = [inputs | {"hidden_states": video(side=n), "encoder_hidden_states": text()}
             for n in (8, 12, 16, 20)]  # fmt: skip
    want = [output(model, size) for size in sizes]
    report, graphs = patch(model), []
    for size, expected in zip(sizes, want, strict=True):
        got, ops = run(model, size, report)
        graphs.append(len(report.graphs))
        assert deviation(got, expected) <= LIMIT and ops == WAN
    assert graphs[1] == graphs[2] == graphs[3] <= 2


@torch.no_grad()
def test_twelve_models_of_one_class():
    reports, inputs = [], Small.inputs()
    for seed in range(12):
        model = Small(seed)
        want = output(model, inputs)
        reports.append(patch(model))
        got, ops = run(model, inputs, reports[-1])
        assert deviation(got, want) <= LIMIT and ops == 6
    assert not any(report.unfused for report in reports)


@torch.no_grad()
def test_more_kinds_of_inputs_than_dynamo_keeps_graphs_for():
    model = Small()
    kinds = [Small.inputs(batch) | {"shift": shift} for batch in (2, 1) for shift in (None, 0.5)]
    want = [output(model, kind) for kind in kinds]
    report = patch(model)
    with torch._dynamo.config.patch(recompile_limit=2):
        for kind, expected in zip(kinds[:2], want, strict=False):
            got, ops = run(model, kind, report)
            assert deviation(got, expected) <= LIMIT and ops >= 4
        assert not report.unfused
        with pytest.warns(UserWarning, match="Block runs unfused: .*recompile_limit"):
            got, ops = run(model, kinds[2], report)
        assert torch.equal(got, want[2]) and ops == 0
        assert torch.equal(run(model, kinds[3], report)[0], want[3])
        assert run(model, kinds[0], report)[1] == 6  # its graphs are still there
    assert report.unfused == {"layers.0": 2, "layers.1": 2}
    assert "2 calls of layers.0 ran it unfused" in str(report)


def test_a_model_in_training_keeps_its_parameters():
    """An optimizer may have them: what is shared for inference stays apart, and gets gradients."""
    shared, inputs = make("lumina_next_shared")
    model, _ = make("lumina_next", seed=1)
    model.load_state_dict(shared.state_dict())
    model.train()
    owned, want = dict(model.named_parameters()), gradients(model, inputs)
    report = patch(model)
    got = gradients(model, inputs)
    assert report.fused and largest_deviation(got, want) <= 1e-5
    assert all(owned[name] is parameter for name, parameter in model.named_parameters())
