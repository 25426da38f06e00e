"""Two attentions with one query: it is computed once while their weights are equal, and the weights
stay the owner's."""

import pytest
import torch
from checks import deviation, gradients, largest_deviation, run
from models import make, output

from lumina_kernels import patch, unpatch

LIMIT = 2e-5


def lumina_next():
    """A model whose attentions of image and text have equal queries, in parameters of their own;
    its twin, and inputs."""
    shared, inputs = make("lumina_next_shared")
    models = [make("lumina_next", seed=1)[0] for _ in range(2)]
    for model in models:
        model.load_state_dict(shared.state_dict())
    return *models, inputs


def queries(model):
    layer = model.layers[0]
    return layer.attn1.to_q.weight, layer.attn2.to_q.weight


def merged_adapters(model):
    """As libraries merge them, behind the back of the version counters."""
    versions = [weight._version for weight in queries(model)]
    for i, weight in enumerate(queries(model)):
        weight.data += 0.1 * (i + 1) * torch.eye(288)
    assert versions == [weight._version for weight in queries(model)]


def loaded(model):
    generator = torch.Generator().manual_seed(3)
    model.load_state_dict({
        name: x + 0.05 * torch.randn(x.shape, generator=generator)
        for name, x in model.state_dict().items()
    })  # fmt: skip


def trained(model):
    for i, weight in enumerate(queries(model)):
        weight.grad = (i + 1.0) * torch.eye(288)
    torch.optim.SGD(queries(model), lr=0.1).step()


def products(model, inputs):
    """How many products of matrices a forward has."""
    with torch.autograd.profiler.profile() as profile:
        model(**inputs)
    return sum(event.name in ("aten::mm", "aten::addmm") for event in profile.function_events)


@torch.no_grad()
def test_equal_queries_are_computed_once():
    model, twin, inputs = lumina_next()
    owned = dict(model.named_parameters())
    report = patch(model)
    got, ops = run(model, inputs, report)
    assert deviation(got, output(twin, inputs)) <= LIMIT and ops == 16
    assert str(report).count("attention and text") == 1
    assert products(twin, inputs) - products(model, inputs) == 2  # one in each layer
    assert len(owned) == len(dict(twin.named_parameters()))
    assert all(owned[name] is p for name, p in model.named_parameters())


@pytest.mark.parametrize("change", (merged_adapters, loaded, trained))
@torch.no_grad()
def test_equal_queries_that_become_different(change):
    model, twin, inputs = lumina_next()
    report, before = patch(model), output(twin, inputs)
    assert run(model, inputs, report)[1] == 16
    for m in (model, twin):
        change(m)
    got, ops = run(model, inputs, report)
    want = output(twin, inputs)
    assert deviation(got, want) <= LIMIT and deviation(before, want) > 1e-3
    assert ops == (20 if change is loaded else 18)  # of all layers, or the first
    for m in (model, twin):
        for layer in m.layers:
            layer.attn2.to_q.load_state_dict(layer.attn1.to_q.state_dict())
            layer.attn2.norm_q.load_state_dict(layer.attn1.norm_q.state_dict())
    got, ops = run(model, inputs, report)
    assert deviation(got, output(twin, inputs)) <= LIMIT and ops == 16
    unpatch(model)
    assert torch.equal(output(model, inputs), output(twin, inputs))


@torch.no_grad()
def test_equal_queries_in_another_dtype_then_unpatched():
    model, _, inputs = lumina_next()
    patch(model)
    output(model, inputs)
    model.double()
    unpatch(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    patch(model)
    model.to("meta")
    unpatch(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_equal_queries_have_gradients_of_their_own():
    model, twin, inputs = lumina_next()
    report = patch(model)
    with torch.no_grad():
        output(model, inputs)
    got, want = gradients(model, inputs), gradients(twin, inputs)
    assert report.fused and largest_deviation(got, want) <= 1e-5
    assert not torch.equal(*(weight.grad for weight in queries(model)))


@torch.no_grad()
def test_a_patched_model_is_saved(tmp_path):
    model, twin, inputs = lumina_next()
    patch(model)
    output(model, inputs)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(saved, inputs), output(twin, inputs))
