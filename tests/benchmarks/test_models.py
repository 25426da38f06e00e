"""The benchmarks of whole networks: both networks compute the same, and the FLOPs are right."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.case import as_tuple, difference
from benchmarks.harness.shapes import COMPACT, QUARTER
from benchmarks.models import bench_block, bench_forward, bench_sample, networks

SMALL = QUARTER.but(side=3, T=5, layers=2, dtype="float32")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("bench", [bench_block, bench_forward])
def test_ours_is_the_network_that_users_have(bench):
    case = bench.case(SMALL, "cpu")
    expected = as_tuple(case.eager(**case.inputs))
    for name, function in case.ours.items():
        assert difference(name, as_tuple(function(**case.inputs)), expected) < 1e-6
    assert case.info["eager is"] == "diffusers"


@pytest.mark.parametrize("bench", [bench_block, bench_forward])
def test_without_diffusers_the_definition_is_the_baseline(bench, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    case = bench.case(SMALL, "cpu")
    out = as_tuple(next(iter(case.ours.values()))(**case.inputs))
    assert difference("ours", out, as_tuple(case.eager(**case.inputs))) < 1e-6
    assert case.info["eager is"] != "diffusers"


def test_a_block_counts_its_matrix_products():
    case = bench_block.case(SMALL, "cpu")
    model = networks.our_network(SMALL, "cpu", "torch")
    with FlopCounterMode(display=False) as counter:
        bench_block.Block(model, SMALL.side, "cpu")(**case.inputs)
    assert case.flops == counter.get_total_flops()


def test_a_forward_counts_its_matrix_products():
    case = bench_forward.case(SMALL, "cpu")
    model = networks.our_network(SMALL, "cpu", "torch")
    with FlopCounterMode(display=False) as counter:
        model(**case.inputs)
    assert case.flops == counter.get_total_flops()


def test_context_drop_computes_something_else():
    case = bench_forward.case(SMALL, "cpu")
    whole = as_tuple(case.eager(**case.inputs))
    with pytest.raises(AssertionError, match="differs from eager"):
        difference("drop", as_tuple(case.peers["lumina-drop2"]()(**case.inputs)), whole)


def test_errors_of_sampling_fall_with_its_cost(monkeypatch):
    """Of some of the settings, against a solution that is exact enough for them."""
    shape, all_of = COMPACT.but(B=1, quick=True), bench_sample.variants

    def few(shape):
        drop = "lumina-ab2-uniform-20-drop"
        names = [n for n in all_of(shape) if n == drop or not n.endswith("-drop")]
        return [n for n in names if "midpoint" not in n]

    monkeypatch.setattr(bench_sample, "variants", few)
    monkeypatch.setitem(bench_sample.EXACT_STEPS, True, 50)
    info = bench_sample.case(shape, "cpu").variant_info
    for setting in ("euler-uniform", "ab2-uniform"):
        errors = [info[f"lumina-{setting}-{nfe}"]["error"] for nfe in bench_sample.NFE]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1
    assert info["lumina-ab2-uniform-20-drop"]["error"] > info["lumina-ab2-uniform-20"]["error"]
