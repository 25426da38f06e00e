"""The benchmarks of patched networks: what is compared computes the same, on the ops or without,
and the table that they print."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from common import needs_kernels

from benchmarks import conftest, patched
from benchmarks.harness.case import Case, as_tuple, difference
from benchmarks.harness.measure import measure
from benchmarks.models import bench_patched, bench_patched_block
from benchmarks.models.diffusers_networks import MODELS, network

BLOCKS = {shape.model: shape.but(dtype="float32") for shape in bench_patched_block.NARROW}
NETWORKS = {model: BLOCKS[model] for model in (shape.model for shape in MODELS)}


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def ops_of(function, inputs) -> int:
    """Calls of this package's ops."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(**inputs)
    return sum(event.name.startswith("lumina_kernels") for event in profile.events())


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_depends_on_its_inputs(model):
    shape = NETWORKS[model]
    net, inputs = network(shape, "cpu")
    function = bench_patched.forward(net)
    (out, *_) = as_tuple(function(**inputs))
    assert out.shape[-1] in (2 * shape.side, 64) and out.isfinite().all()
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.any():
            changed = inputs | {name: value + 0.5}
            assert not torch.equal(as_tuple(function(**changed))[0], out), name


@needs_kernels
@pytest.mark.parametrize(
    ("bench", "model"), [(bench_patched, "lumina-next"), (bench_patched_block, "flux-single")]
)
def test_ours_is_patched_and_computes_the_same(bench, model):
    case = bench.case(BLOCKS[model], "cpu")
    expected = as_tuple(case.eager(**case.inputs))
    for name, function in case.ours.items():
        assert difference(name, as_tuple(function(**case.inputs)), expected) < 1e-5
        assert ops_of(function, case.inputs) > 3
    assert ops_of(case.eager, case.inputs) == 0


@pytest.mark.parametrize("model", BLOCKS)
def test_a_block_is_given_what_its_network_gives_it(model):
    shape = BLOCKS[model]
    case = bench_patched_block.case(shape, "cpu")
    rows = [z for z in as_tuple(case.eager(**case.inputs)) if z.ndim == 3]
    assert rows and all(z.shape[2] == shape.D and z.isfinite().all() for z in rows)
    assert case.threads == 1 and 192 <= shape.D <= 288
    assert not any(z.requires_grad for z in case.inputs.values() if isinstance(z, torch.Tensor))


@needs_kernels
def test_the_weights_are_there_once():
    case = bench_patched_block.case(BLOCKS["dit"], "cpu")
    theirs, ours = (list(x.parameters()) for x in (case.eager, *case.ours.values()))
    assert theirs and all(a is b for a, b in zip(theirs, ours, strict=True))


def test_the_threads_of_a_case_and_the_variants_that_are_asked_for():
    threads, seen = torch.get_num_threads(), set()

    def function(x):
        seen.add(torch.get_num_threads())
        return 2 * x

    peers = {"slow": lambda: pytest.fail("was not asked for")}
    case = Case({"x": torch.ones(8)}, {"ours": function}, function, peers=peers, compiled=False)
    other = threads + 1
    rows = measure(replace(case, threads=other), "cpu", 0.0, names=("ours", "eager"), batches=5)
    assert seen == {other} and torch.get_num_threads() == threads
    assert {name: len(row.batches) for name, row in rows.items()} == {"eager": 5, "ours": 5}


def test_torch_compile_can_be_left_out():
    option = SimpleNamespace(device="cpu", no_compile=False)
    quick, shape, *_ = bench_patched.SHAPES
    assert conftest.variants_of(bench_patched, quick, option) == ("lumina-cpu", "eager")
    names = conftest.variants_of(bench_patched, shape, option)
    assert names == ("lumina-cpu", "eager", "compile", "lumina-compile")
    option.no_compile = True
    assert conftest.variants_of(bench_patched, shape, option) == ("lumina-cpu", "eager")


@pytest.mark.parametrize("bench", (bench_patched, bench_patched_block))
@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_one_quick_shape_for_each_device(bench, device):
    shapes = [shape for shape in bench.SHAPES if device in shape.devices]
    assert [shape.quick for shape in shapes] == [True, *[False] * (len(shapes) - 1)]
    assert len(set(map(str, shapes))) == len(shapes)


def test_the_table():
    def row(case, variant, seconds, speed):
        info = {"variant": variant, "x eager": speed}
        return {"group": case, "extra_info": info, "stats": {"median": seconds}}

    rows = [
        row("patched flux", "lumina-cpu", 0.5, 1.4),
        row("patched flux", "eager", 0.7, 1.0),
        row("patched dit", "eager", 0.0123, 1.0),
        row("patched dit", "compile", 0.01, 1.23),
    ]
    assert patched.table(rows) == [
        "| case | eager, ms | lumina-cpu, ms | compile, ms |",
        "| --- | --- | --- | --- |",
        "| patched flux | 700 | 500 (1.40) |  |",
        "| patched dit | 12.3 |  | 10 (1.23) |",
    ]
