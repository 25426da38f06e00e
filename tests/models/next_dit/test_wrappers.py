"""What other libraries put around a network, its blocks or its layers takes effect, and changes
nothing else: compilers, checkpointing, adapters, quantisation, offloading."""

import copy
import functools
import io
import pickle

import pytest
import torch
from common import BACKENDS, DEVICE
from networks import IMAGE, cast, config, inputs, randomise
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.utils.checkpoint import checkpoint

from benchmarks.scale.counted import kept_bytes
from lumina import NextDiT, sample
from lumina.models.next_dit.block import TransformerBlock

LINEARS = "wq wk wv wo wk_y wv_y w1 w2 w3 adaLN_modulation.1 x_embedder t_embedder.mlp.0 linear"


def network(backend="torch", **changes):
    """Of two blocks, in float32, with random weights."""
    torch.manual_seed(0)
    model = randomise(NextDiT(config(dim=48, **changes), backend).to(DEVICE), torch.float32)
    return model.float()


@functools.cache
def arguments():
    torch.manual_seed(1)
    return cast(inputs(*IMAGE), torch.float32)


def drawn(model):
    _, _, feats, mask = arguments()
    noise = arguments()[0]
    return sample(
        model, feats, mask, feats[:1] / 2, mask[:1], size=IMAGE[1:], latents=noise, steps=2
    ).latents


def gradients(model):
    model.zero_grad()
    out = model(*arguments())
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(results, expected):
    (out, grads), (expected_out, expected_grads) = results, expected
    assert torch.equal(out, expected_out)
    for name, grad in expected_grads.items():
        assert torch.equal(grads[name], grad), name


# Compilers


@pytest.mark.parametrize("what", ["network", "block"])
def test_compiled(what):
    """`sample` runs the compiled code, and so do the other callers."""
    model, graphs = network(), []
    expected = drawn(model)

    def compiled(graph, _):
        graphs.append(graph)
        return graph.forward

    if what == "network":
        fast = torch.compile(model, backend=compiled, fullgraph=True)
    else:
        fast = model
        for i, layer in enumerate(model.layers):
            model.layers[i] = torch.compile(layer, backend=compiled, fullgraph=True)
    assert torch.equal(drawn(fast), expected)
    assert graphs


# Checkpointing


class Checkpointed(nn.Module):
    def __init__(self, layer, **settings):
        super().__init__()
        self.layer, self.settings = layer, settings

    def forward(self, *args):
        return checkpoint(self.layer, *args, **self.settings)


def checkpointed(model, kind):
    for i, layer in enumerate(model.layers):
        model.layers[i] = {
            "non-reentrant": lambda layer: Checkpointed(layer, use_reentrant=False),
            "reentrant": lambda layer: Checkpointed(layer, use_reentrant=True),
            "checkpoint_wrapper": wrappers.checkpoint_wrapper,
            "reentrant wrapper": lambda layer: wrappers.checkpoint_wrapper(
                layer, checkpoint_impl=wrappers.CheckpointImpl.REENTRANT
            ),
        }[kind](layer)
    return model


def unwrapped(results):
    out, grads = results
    inner = (".layer.", "._checkpoint_wrapped_module.")
    for name in inner:
        grads = {n.replace(name, "."): grad for n, grad in grads.items()}
    return out, grads


KINDS = ("non-reentrant", "reentrant", "checkpoint_wrapper", "reentrant wrapper")


@pytest.mark.parametrize("backend", [n for n in ("torch", "cpu") if n in ("torch", *BACKENDS)])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_by_block(kind, backend):
    model = network(backend)
    expected = gradients(model)
    assert_same(unwrapped(gradients(checkpointed(copy.deepcopy(model), kind))), expected)


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_checkpointing_by_block_saves_memory(kind):
    """A block keeps two rows of (B, L, D), its carry; without checkpointing it is over twenty."""
    torch.manual_seed(2)
    size, layers = (3, 24, 24), 4
    given = cast(inputs(*size), torch.float32)
    row = 3 * 12 * 12 * 48 * 4  # bytes
    model = network(n_layers=layers)

    def kept(network):
        return kept_bytes(network, lambda: network(*given).sum().backward())

    plain, saved = kept(model), kept(checkpointed(model, kind))
    assert plain > 20 * layers * row
    if kind == "non-reentrant":  # the inputs of a block are not among what the hooks see
        assert saved < plain / 8
    else:
        assert saved < (3 * layers + 12) * row


def test_checkpoints_where_a_predicate_says():
    model = network()
    expected = gradients(model)
    wrapped = copy.deepcopy(model)
    wrappers.apply_activation_checkpointing(
        wrapped, check_fn=lambda module: isinstance(module, TransformerBlock)
    )
    assert all(isinstance(layer, wrappers.CheckpointWrapper) for layer in wrapped.layers)
    assert_same(unwrapped(gradients(wrapped)), expected)


# Adapters, quantisation, casting, offloading


@pytest.mark.parametrize("target", LINEARS.split())
def test_lora(target):
    """On any linear layer: trained, switched off, merged."""
    peft = pytest.importorskip("peft")
    model = network()
    expected, pictures = model(*arguments()).detach(), drawn(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target]))
    assert torch.equal(tuned(*arguments()), expected)
    tuned(*arguments()).square().sum().backward()
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained and all(p.grad.any() for n, p in trained.items() if "lora_B" in n)
    with torch.no_grad():
        for parameter in trained.values():
            nn.init.normal_(parameter, std=0.3)
        out = tuned(*arguments())
        assert (out - expected).abs().max() > 1e-3
        assert (drawn(tuned) - pictures).abs().max() > 1e-3
        with tuned.disable_adapter():
            assert torch.equal(tuned(*arguments()), expected)
            assert torch.equal(drawn(tuned), pictures)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(*arguments()), out, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*quantization.*is deprecated")
def test_quantized():
    model = network().cpu().eval()
    given = [z.cpu() for z in arguments()]
    expected = model(*given)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    assert sum("quantized" in type(m).__module__ for m in small.modules()) >= len(linears)
    out = small(*given)
    assert 1e-4 < (out - expected).norm() / expected.norm() < 0.1
    _, _, feats, mask = given
    pictures = [
        sample(m, feats, mask, feats, mask, size=(4, 6), latents=given[0], steps=2).latents
        for m in (model, small)
    ]
    assert 1e-4 < (pictures[0] - pictures[1]).norm() / pictures[0].norm() < 0.2


def test_layerwise_casting():
    """Weights of linear layers kept in 8 bits, widened for each call."""
    hooks = pytest.importorskip("diffusers.hooks")
    model = network()
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    hooks.apply_layerwise_casting(
        model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32,
        skip_modules_pattern=(),
    )  # fmt: skip
    assert model.layers[0].attention.wq.weight.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        assert torch.equal(model(*arguments()), rounded(*arguments()))
        assert model.layers[0].attention.wq.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(drawn(model), drawn(rounded))


@pytest.mark.parametrize("by", ["layer", "block"])
def test_offloaded(by):
    """Parameters that are there only while the module they belong to is called."""
    accelerate = pytest.importorskip("accelerate")
    model = network()
    with torch.no_grad():
        expected, pictures = model(*arguments()), drawn(model)
        whole = ["TransformerBlock"] if by == "block" else None
        accelerate.cpu_offload(model, execution_device=DEVICE, preload_module_classes=whole)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert torch.equal(model(*arguments()), expected)
        assert torch.equal(drawn(model), pictures)
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_hooks_on_blocks_see_every_call():
    model, calls = network(), []
    layer = model.layers[1]
    layer.register_forward_pre_hook(lambda m, args: calls.append("before"))
    handle = layer.register_forward_hook(lambda m, args, out: calls.append("after"))
    drawn(model)
    assert calls == ["before", "after"] * 6  # two batches of captions, four evaluations
    handle.remove()
    expected = model(*arguments())
    layer.register_forward_hook(lambda m, args, out: (2 * out[0], *out[1:]))
    assert (model(*arguments()) - expected).abs().max() > 1e-3


# Copies


def test_copies():
    model = network()
    expected = gradients(model)
    model.zero_grad()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert_same(gradients(twin), expected)
        with torch.no_grad():
            twin.layers[0].ffn_norm1.weight.zero_()
        assert not torch.equal(twin(*arguments()), expected[0])
    assert torch.equal(model(*arguments()), expected[0])
