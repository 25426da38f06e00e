"""What `patch` leaves to the model's owner: hooks, threads, export, memory, and what is patched
when."""

import gc
import threading
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from checks import Block, Small, deviation, gradients, largest_deviation, run
from models import output
from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from lumina_kernels import patch, unpatch

LIMIT = 2e-5


def warm(seed=0):
    """A patched model that has run, and its twin that is not patched."""
    model, twin, inputs = Small(seed), Small(seed), Small.inputs()
    report = patch(model)
    with torch.no_grad():
        assert deviation(output(model, inputs), output(twin, inputs)) <= LIMIT
    assert report.fused == 6
    return model, twin, inputs, report


def negated(module, args, result):
    return -result


def doubled_input(module, args, kwargs):
    return (2 * args[0], *args[1:]), kwargs


HOOKS = {  # how it is added to a module, and whether it acts on the forward
    "forward": (lambda m: m.register_forward_hook(negated), True),
    "forward pre": (lambda m: m.register_forward_pre_hook(doubled_input, with_kwargs=True), True),
    "backward": (lambda m: m.register_full_backward_hook(lambda m, dx, dy: (3 * dx[0], *dx[1:])),
                 False),
    "backward pre": (lambda m: m.register_full_backward_pre_hook(lambda m, dy: (3 * dy[0],)),
                     False),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ("layers.0", "layers.0.up", "layers"))
def test_hooks_that_are_added_to_a_warm_model(kind, where):
    """Those of a block around its ops; with those inside it runs as it was."""
    model, twin, inputs, report = warm()
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    for add in (HOOKS[kind][0], HOOKS["forward"][0]):  # one, and another beside it
        handles = []
        for m in (model, twin):
            targets = m.layers if where == "layers" else [m.get_submodule(where)]
            handles += [add(target) for target in targets]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Block runs unfused: modules inside of it have hooks")
            before = report.fused
            got, want = gradients(model, inputs), gradients(twin, inputs)
            called = report.fused - before
            assert called == (3 if where == "layers.0.up" else 6)
            assert largest_deviation(got, want) <= 1e-5
            assert deviation(output(model, inputs).detach(), output(twin, inputs)) <= LIMIT
    assert all("forward" not in vars(module) for module in model.modules())
    for module in (*model.modules(), *twin.modules()):
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            getattr(module, hooks).clear()
        module._backward_pre_hooks.clear()
    before = report.fused
    with torch.no_grad():
        assert deviation(output(model, inputs), output(twin, inputs)) <= LIMIT
    assert report.fused - before == 6


@torch.no_grad()
def test_a_hook_of_all_modules():
    model, twin, inputs, report = warm()
    seen = []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        with pytest.warns(UserWarning, match="Block runs unfused: modules inside of it have hooks"):
            got, ops = run(model, inputs, report)
        seen_of_model, seen = seen[:], []
        assert ops == 0 and len(seen_of_model) == 2 * 4 + 1
    finally:
        handle.remove()
    assert torch.equal(got, output(twin, inputs)) and run(model, inputs, report)[1] == 6
    assert "1 calls of layers.0 ran it unfused" in str(report)


@torch.no_grad()
def test_a_hook_sees_the_block_and_one_that_raises_leaves_nothing_behind():
    model, _, inputs, report = warm()
    block, seen = model.layers[0], []
    handle = block.register_forward_hook(lambda module, *_: seen.append(module))
    assert run(model, inputs, report)[1] == 6 and seen == [block]
    handle.remove()

    def fails(*_):
        raise KeyError("hook")

    handle = block.register_forward_pre_hook(fails)
    with pytest.raises(KeyError, match="hook"):
        model(**inputs)
    handle.remove()
    assert "forward" not in vars(block) and run(model, inputs, report)[1] == 6


@torch.no_grad()
def test_export_of_a_patched_model():
    for strict in (False, True):
        model, twin, inputs, _ = warm()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.compile of a patched model")
            program = torch.export.export(model, (), inputs, strict=strict)
        assert torch.equal(output(program.module(), inputs), output(twin, inputs))
        assert not any("lumina" in str(node.target) for node in program.graph.nodes)


@torch.no_grad()
def test_while_another_thread_compiles():
    model, twin, inputs, report = warm()
    started, done, results = threading.Event(), threading.Event(), []

    def slow(gm, inputs):
        started.set()
        assert done.wait(30)
        return gm

    other = threading.Thread(target=lambda: results.append(
        torch.compile(lambda x: x.sin() + 1, backend=slow)(torch.zeros(3))
    ))  # fmt: skip
    other.start()
    assert started.wait(30)  # in torch 2.13 is_compiling() is now true in this thread, too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, ops = run(model, inputs, report)
    done.set()
    other.join()
    assert ops == 6 and deviation(got, output(twin, inputs)) <= LIMIT and len(results) == 1
    assert not report.unfused


def test_eight_threads_on_a_model_that_is_new():
    model, twin = Small(), Small()
    inputs, results = [Small.inputs() for _ in range(8)], {}
    report, barrier = patch(model), threading.Barrier(8)

    @torch.no_grad()
    def work(i):
        barrier.wait()
        results[i] = [output(model, inputs[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        want = [output(twin, x) for x in inputs]
    assert all(deviation(got, want[i]) <= LIMIT for i in range(8) for got in results[i])
    assert len(report.graphs) == 1 and not report.unfused
    assert dict(report.graphs[0].calls) == {"layers.0": 24, "layers.1": 24}


class Breaks(Block):
    """Its forward has to be captured in two graphs."""

    def forward(self, x, scale, shift):
        x = super().forward(x, scale, shift)
        torch._dynamo.graph_break()
        return super().forward(x, scale, shift)


def graph_modules(but=()):
    """All that are alive, but for those: torch.compile may free other tests' at any time."""
    gc.collect()
    alive = [x for x in gc.get_objects() if issubclass(type(x), GraphModule) and x not in but]
    return weakref.WeakSet(alive)


@pytest.mark.parametrize("kind", (Block, Breaks))
@torch.no_grad()
def test_nothing_outlives_the_model_or_unpatch(kind):
    model, inputs = Small(), Small.inputs()
    model.layers = nn.ModuleList(kind(32) for _ in range(2))
    before, want = graph_modules(), output(model, inputs)
    for backend in ("torch", "cpu"):
        report = patch(model, backend=backend)
        got, ops = run(model, inputs, report)
        assert deviation(got, want) <= LIMIT and ops == (6 if kind is Block else 12)
        assert {row["backend"] for row in report.rows() if row["op"] == "gelu"} == {backend}
        patched = weakref.ref(model.layers[0]._compiled_call_impl.patched)
        alive = [weakref.ref(p) for p in model.parameters()]
        assert graph_modules(but=before) and patched()
        if backend == "torch":
            unpatch(model)
        else:
            del model
        assert (len(graph_modules(but=before)), patched()) == (0, None)
    assert not any(ref() is not None for ref in alive)


@torch.no_grad()
def test_a_pipeline_with_one_transformer_by_two_names():
    model = Small()
    report = patch(SimpleNamespace(components={"transformer": model, "transformer_2": model}))
    assert report.blocks == ["transformer.layers.0", "transformer.layers.1"]
    assert run(model, Small.inputs(), report)[1] == 6


def test_a_pipeline_is_patched_whole_or_not_at_all():
    parts = {"transformer": Small(), "transformer_2": Small()}
    parts["transformer_2"].layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="the model is compiled: patch it before, or use"):
        patch(SimpleNamespace(components=parts))
    assert parts["transformer"].layers[0]._compiled_call_impl is None


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Small(0), Small(1)

    def forward(self, x, scale):
        return self.b(self.a(x, scale), scale)


@torch.no_grad()
def test_parts_that_are_patched_by_themselves():
    model, inputs = Two(), Small.inputs()
    want = output(model, inputs)
    patch(model.a)
    with pytest.raises(ValueError, match="a part of the model is patched by itself: call unpatch"):
        patch(model)
    patch(model.b)
    unpatch(model)
    assert torch.equal(output(model, inputs), want)
    report = patch(model)
    assert len(report.blocks) == 4 and patch(model.a) is report
    assert run(model, inputs, report)[1] == 12
    unpatch(model.a)
    assert run(model, inputs, report)[1] == 6
    assert patch(model) is report and run(model, inputs, report)[1] == 12
    assert len(report.blocks) == 4


@torch.no_grad()
def test_blocks_that_are_added_or_stand_twice():
    model, inputs = Small(), Small.inputs()
    report = patch(model)
    model.layers.append(Block(32))
    assert run(model, inputs, report)[1] == 6
    assert patch(model) is report and run(model, inputs, report)[1] == 9
    assert report.blocks == ["layers.0", "layers.1", "layers.2"] and not report.not_run
    model = Small()
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    report = patch(model)
    assert run(model, inputs, report)[1] == 9 and report.blocks == ["layers.0"]
    assert not report.not_run and "not run" not in str(report)


class Verified(nn.Module):
    """A block with dropout, that counts its calls, and what else it returns."""

    def __init__(self, function):
        super().__init__()
        self.function, self.drop = function, nn.Dropout(0.5)
        self.norm = nn.ModuleList([nn.LayerNorm(8), nn.Identity()])
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.drop(self.norm[0](x)), self.function(x, self.calls)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_verify_of_blocks_with_dropout_buffers_and_odd_results(dtype):
    functions = [
        lambda x, calls: x * calls, lambda x, calls: x[:0],
        lambda x, calls: torch.where(x > 0, x, float("nan")), lambda x, calls: x / 0,
    ]  # fmt: skip
    x, model, twin = torch.randn(2, 5, 8).to(dtype), nn.Module(), nn.Module()
    for m in (model, twin):
        m.blocks = nn.ModuleList(map(Verified, functions)).to(dtype).train()
        m.forward = lambda x, m=m: [y for block in m.blocks for y in block(x)]
    report = patch(model, verify=True)
    for _ in range(2):
        torch.manual_seed(1)
        got = model(x)
        torch.manual_seed(1)
        for a, b in zip(got, twin(x), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    assert [block.calls.item() for block in model.blocks] == [2, 2, 2, 2]
    assert report.fused == 8


@torch.no_grad()
def test_verify_needs_numbers_and_forwards_that_are_the_blocks_own():
    model = Small().to("meta")
    inputs = {name: x.to("meta") for name, x in Small.inputs().items()}
    patch(model, verify=True)
    assert model(**inputs).shape == (2, 5, 32)
    model = Small()
    patch(model, verify=True)
    model.layers[0].forward = model.layers[0].forward
    with pytest.raises(ValueError, match="verify=True needs blocks whose forward is their own"):
        model(**Small.inputs())


@torch.no_grad()
def test_a_dispatch_mode_is_named_as_the_reason():
    model, _, inputs, report = warm()
    with pytest.warns(UserWarning, match="Block runs unfused: a dispatch mode is active"):
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    assert counter.get_total_flops() > 0 and run(model, inputs, report)[1] == 6
