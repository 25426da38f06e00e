"""`patch`, `unpatch` and the Dynamo backend: what they change, refuse and report."""

import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from checks import Small, deviation, gradients, largest_deviation, run
from models import cast, make, output
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import compile_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lumina_kernels import patch, unpatch
from lumina_kernels.dropin import fuse, rows
from lumina_kernels.patching import compile_backend
from tests.common import DEVICE

LIMIT = 2e-5


def ways_to_name_the_backend():
    if "lumina_kernels" not in torch._dynamo.list_backends(None):  # the package is not installed
        torch._dynamo.register_backend(compile_backend, name="lumina_kernels")
    return compile_backend, "lumina_kernels"


def one_block_of_each(name):
    """A model whose lists of blocks have one block each."""
    model, inputs = make(name)
    for path, child in list(model.named_children()):
        if isinstance(child, nn.ModuleList):
            setattr(model, path, child[:1])
    return model, inputs


def test_a_whole_model_compiles_to_one_graph(monkeypatch):
    model, inputs = one_block_of_each("flux")
    want, gradient = output(model, inputs).detach(), gradients(model, inputs)
    graphs = []

    def eager(gm, inputs, **options):  # in place of Inductor, which takes a minute
        graphs.append([node.target.__name__ for node in gm.graph.nodes if callable(node.target)])
        return aot_eager(gm, inputs)

    monkeypatch.setattr(compile_fx, "compile_fx", eager)
    compiled = torch.compile(model, backend=compile_backend, fullgraph=True)
    assert largest_deviation(gradients(compiled, inputs), gradient) <= 1e-5
    assert deviation(output(compiled, inputs).detach(), want) <= LIMIT
    (ops,) = graphs
    expected = {
        "gqa_attention": 2, "rope_table": 1, "qk_norm_rope_table": 1, "gate_residual_norm": 2,
        "norm_modulate": 8, "gelu": 3,
    }  # fmt: skip
    for op, count in expected.items():
        assert sum(name.startswith(op) for name in ops) == count, ops


def test_inductor_compiles_the_ops():
    model, inputs = Small(), Small.inputs()
    want, gradient = output(model, inputs).detach(), gradients(model, inputs)
    for backend in ways_to_name_the_backend():
        torch._dynamo.reset()
        options = {"fallback_by_default": True}  # a library call for each node: much faster to make
        compiled = torch.compile(model, backend=backend, fullgraph=True, options=options)
        assert largest_deviation(gradients(compiled, inputs), gradient) <= 1e-5
        assert deviation(output(compiled, inputs).detach(), want) <= LIMIT


@torch.no_grad()
def test_every_block_of_a_patched_model_is_one_graph():
    model, inputs = make("flux")
    want = output(model, inputs)
    report = patch(model)
    got, ops = run(model, inputs, report)
    kinds = {type(block) for block in (*model.transformer_blocks, *model.single_transformer_blocks)}
    graphs_of = [sum(path in graph.calls for graph in report.graphs) for path in report.blocks]
    assert graphs_of == [1] * 4 and len(kinds) == 2 and ops == 38
    assert deviation(got, want) <= LIMIT and not report.not_run


@torch.no_grad()
def test_compiling_a_patched_model():
    model, inputs = Small(), Small.inputs()
    report = patch(model)
    want, ops = run(model, inputs, report)
    with pytest.warns(UserWarning, match='Compile it with torch.compile.model, backend="lumina'):
        got, called = run(torch.compile(model, backend="eager"), inputs, report)
    assert deviation(got, want) <= LIMIT and (ops, called) == (6, 0)
    for backend in ways_to_name_the_backend():
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            compiled = torch.compile(model, backend=backend, options={"fallback_by_default": True})
            assert deviation(output(compiled, inputs), want) <= LIMIT
    for call in (patch, unpatch):
        with pytest.raises(ValueError, match="the model is compiled: patch it before, or use"):
            call(compiled)


@torch.no_grad()
def test_patching_twice_and_back():
    model, inputs = Small(), Small.inputs()
    want, owned = output(model, inputs), list(model.named_parameters())
    report = patch(model)
    assert deviation(run(model, inputs, report)[0], want) <= LIMIT
    assert patch(model) is report and len(report.blocks) == 2
    for options in ({"exact": True}, {"verify": True}, {"backend": "torch"}):
        with pytest.raises(ValueError, match="patched with other options: call unpatch first"):
            patch(model, **options)
    unpatch(model)
    unpatch(model)
    assert torch.equal(output(model, inputs), want) and report.fused == 6
    assert all(a is b for (_, a), (_, b) in zip(owned, model.named_parameters(), strict=True))
    assert patch(model, backend="torch") is not report


@torch.no_grad()
def test_a_patched_model_is_freed_with_its_last_name():
    model, inputs = Small(), Small.inputs()
    assert run(model, inputs, patch(model))[1] == 6
    alive = weakref.ref(model), weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_verify(dtype, monkeypatch):
    model, inputs = Small().to(dtype), cast(Small.inputs(), dtype)
    report = patch(model, verify=True)
    assert [run(model, inputs, report)[1] for _ in range(2)] == [6, 6]
    unpatch(model)
    right = rows.norm_of
    wrong = lambda *args: (n := right(*args)) and n._replace(eps=n.eps + 0.1)  # noqa: E731
    monkeypatch.setattr(rows, "norm_of", wrong)
    report = patch(model, verify=True)
    with pytest.raises(ArithmeticError, match="layers.0: error .* where .* is allowed"):
        output(model, inputs)
    assert "norm_modulate" in str(report)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@torch.no_grad()
def test_verify_knows_that_autocast_rounds():
    model, inputs = make("wan")
    report = patch(model, verify=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model, inputs, report)[1] == 20


class Alone(nn.Module):
    """A function of one module, as a block."""

    def __init__(self, function, module=None):
        super().__init__()
        self.function, self.norm = function, module or nn.Identity()
        self.unused = nn.ModuleDict({str(i): nn.Identity() for i in range(3)})

    def forward(self, x, *more):
        return self.function(self.norm(x), *more)


def attention(q):
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def rotated(x, cos, sin):
    """In float32, rounded once."""
    x = x.unflatten(-1, (4, 64)).transpose(1, 2)
    a, b = x.float().chunk(2, -1)
    return attention((x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype))


def rotated_in_sixteen_bits(x, cos, sin):
    x = x.unflatten(-1, (4, 64)).transpose(1, 2)
    a, b = x.chunk(2, -1)
    return attention(x * cos.to(x) + torch.cat((-b, a), -1) * sin.to(x))


def modulated(x, scale, shift):
    return x * (1 + scale.to(x)) + shift.to(x)


def keep(x, *_):
    return x


NORM = dict(eps=1e-6, elementwise_affine=False)
SITES = {
    "layer norm": (Alone(keep, nn.LayerNorm(256)), "norm_modulate"),
    "plain layer norm": (Alone(keep, nn.LayerNorm(256, **NORM)), "norm_modulate"),
    "rms norm": (Alone(keep, nn.RMSNorm(256, eps=1e-6)), "norm_modulate"),
    "rotation": (Alone(rotated), "rope_table"),
    "gelu": (Alone(lambda x, *_: F.gelu(x)), "gelu"),
    "tanh gelu": (Alone(lambda x, *_: F.gelu(x, approximate="tanh")), "gelu"),
    "modulation": (Alone(modulated, nn.LayerNorm(256, **NORM)), "norm_modulate"),
    "gate": (Alone(lambda x, gate, _: x + gate.to(x) * x), None),
    "glu": (Alone(lambda x, other, _: F.silu(x) * (x + other.to(x))), None),
    "rotation in 16 bits": (Alone(rotated_in_sixteen_bits), None),
}


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_exact_replaces_what_is_rounded_once(name):
    block, op = SITES[name]
    angles = torch.randn(96, 64)
    inputs = [torch.randn(2, 96, 256).bfloat16(), angles.cos(), angles.sin()]
    if "rotation" not in name:
        inputs[1:] = torch.randn(2, 2, 1, 256).unbind(0)
    model = nn.Sequential()
    model.blocks = nn.ModuleList([block.bfloat16()])
    model.forward = lambda *inputs: model.blocks[0](*inputs)
    want = model(*inputs)
    report = patch(model, exact=True)
    got = model(*inputs)
    assert [row["op"] for row in report.rows() if row["op"]] == ([op] if op else [])
    left = {row["kind"]: row["reason"] for row in report.rows() if not row["op"]}
    assert set(left.values()) <= {"exact=True, and eager rounds more than once"}
    assert ("attention" in left) == ("rotation" in name) and (op or left)
    if op:
        assert (got == want).float().mean() >= 0.999
    else:
        assert torch.equal(got, want)
    unpatch(model)


@torch.no_grad()
def test_the_report_tells_everything():
    model, inputs = make("prior")
    report = patch(model)
    assert report.not_run == report.blocks == ["transformer_blocks.0", "transformer_blocks.1"]
    assert report.fused == 0 and "not run yet, or compiled otherwise: transformer_blocks.0..1" in (
        str(report)
    )
    assert not (run(model, inputs, report)[1] - 8 or report.not_run)
    first = {(row["module"], row["kind"]): row["calls"] for row in report.rows()}
    assert run(model, inputs, report)[1] == 8 and report.fused == 16
    assert len(first) == 8 and set(first.values()) == {1}
    told = report.to_dict()
    assert told["sites"] == report.rows() and {row["calls"] for row in report.rows()} == {2}
    assert told["unfused_calls"] == {} and told["not_run"] == []
    head, *lines = str(report).splitlines()
    assert head.split("  ")[0] == "module" and len(lines) == 4
    assert all(line.startswith("transformer_blocks.0..1") for line in lines)
    fields = ["transformer_blocks.0..1", "attention", "gqa_attention", "cpu", "1", "2"]
    assert fields in [line.split() for line in lines]


@torch.no_grad()
def test_every_site_that_is_left_has_a_reason():
    model, inputs = make("lumina_next")
    report = patch(model.bfloat16(), exact=True)
    _, ops = run(model, cast(inputs, torch.bfloat16), report)
    left = [row for row in report.rows() if row["op"] is None]
    assert len(left) >= 8 and ops >= 10
    assert all(row["reason"] for row in left) and not any(
        row["reason"] or not row["backend"] for row in report.rows() if row["op"]
    )
    assert "left" in str(report) and left[0]["reason"] in str(report)


@torch.no_grad()
def test_of_a_pipeline_the_transformers_are_patched():
    parts = {"transformer": Small(0), "transformer_2": Small(1), "text_encoder": Small(2)}
    pipeline = SimpleNamespace(components={**parts, "scheduler": object(), "transformer_3": None})
    inputs = Small.inputs()
    want = [output(part, inputs) for part in parts.values()]
    report = patch(pipeline)
    got, ops = zip(*(run(part, inputs, report) for part in parts.values()), strict=True)
    assert ops == (6, 6, 0) and patch(pipeline) is patch(parts["transformer_2"]) is report
    assert max(map(deviation, got, want)) <= LIMIT
    assert report.blocks == [f"{name}.layers.{i}" for name in list(parts)[:2] for i in range(2)]
    unpatch(pipeline)
    assert all(torch.equal(output(p, inputs), w) for p, w in zip(parts.values(), want, strict=True))
    with pytest.raises(ValueError, match="SimpleNamespace is no module and has no transformer"):
        patch(SimpleNamespace(components={"text_encoder": Small()}))
    with pytest.raises(ValueError, match="Linear has no lists of blocks to patch"):
        patch(nn.Linear(2, 2))


@pytest.mark.parametrize("backend", ("torch", "triton"))
@torch.no_grad()
def test_the_backend_is_honoured(backend):
    model, inputs = make("prior")
    inputs = tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, inputs)
    want = output(model.to(DEVICE), inputs)
    report = patch(model, backend=backend)
    got, ops = run(model, inputs, report)
    assert deviation(got, want) <= LIMIT and ops == 8
    assert {row["backend"] for row in report.rows()} == {backend}


def test_a_backend_that_cannot_be_raises():
    model = Small()
    with pytest.raises(ValueError, match="backend 'nothing' is unknown"):
        patch(model, backend="nothing")
    with pytest.raises((ValueError, RuntimeError), match="backend 'cuda' "):  # for the CPU
        patch(model, backend="cuda")
    assert patch(model).blocks == ["layers.0", "layers.1"]


@torch.no_grad()
def test_a_block_that_cannot_be_captured_runs_as_it_was(monkeypatch):
    def fails(gm):
        raise KeyError("of an upstream that has changed")

    model, inputs = Small(), Small.inputs()
    want = output(model, inputs)
    monkeypatch.setattr(fuse, "capture", fails)
    report = patch(model)
    with pytest.warns(UserWarning, match="its capture failed: KeyError: 'of an upstream that has"):
        got, ops = run(model, inputs, report)
    assert torch.equal(got, want) and ops == 0
    assert [(row["module"], row["kind"], row["op"]) for row in report.rows()] == [
        ("layers.0", "graph", None), ("layers.1", "graph", None)
    ]  # fmt: skip
    assert "KeyError: 'of an upstream that has changed'" in str(report)
