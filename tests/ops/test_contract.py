"""What every op keeps on every backend, whatever it computes, on its examples."""

import copy
import pickle

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    NATIVE,
    assert_compiles,
    assert_equal_results,
    assert_rounded_once,
    cast,
    is_float,
    raises,
    run,
)
from contract import (
    COMPILED,
    FIRST,
    LARGE,
    SIZES,
    Calls,
    arguments,
    assert_as_definition,
    call,
    every_call,
    every_op,
    every_quick_call,
    every_registration,
    expected,
    forward,
    results,
)
from torch.utils.flop_counter import FlopCounterMode

from lumina_kernels import swiglu
from lumina_kernels.examples import Sizes


@every_registration
def test_same_bits_again(op, name, backend):
    """Here in the same tensors; every other call has its second run in `test_views_with_gaps`."""
    found = results(op, backend, arguments(op, name))
    assert_equal_results(found, expected(op, name, backend))


@every_op
def test_same_bits_with_any_number_of_threads(op, name):
    if "cpu" not in BACKENDS:
        return
    threads, found = torch.get_num_threads(), []
    inputs = arguments(op, name, LARGE)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(op, "cpu", inputs))
    finally:
        torch.set_num_threads(threads)
    assert_equal_results(found[1], found[0])
    assert_equal_results(found[2], found[0])


@every_call
def test_results_are_those_of_the_definition(op, name, backend):
    assert_as_definition(expected(op, name, backend), arguments(op, name), op, backend)


@every_op
def test_the_definition_is_rounded_once(op, name):
    """All arithmetic is float32, whatever the dtype: also between the steps of a fused op."""
    inputs = cast(arguments(op, name, LARGE), torch.bfloat16)
    exact = run(call(op, "torch"), cast(inputs, torch.float64), wrt=())
    for key, value in run(call(op, "torch"), inputs, wrt=()).items():
        assert_rounded_once(value, exact[key])


@every_call
def test_views_with_gaps(op, name, backend):
    """Rows that do not follow each other, with NaN in between."""

    def with_gaps(x):
        return torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[-1]]

    inputs = arguments(op, name)
    strided = {n: with_gaps(x) for n, x in inputs.items() if is_float(x) and x.ndim > 0}
    assert_equal_results(results(op, backend, inputs | strided), expected(op, name, backend))


@every_call
@pytest.mark.parametrize("empty", ({"B": 0}, {"grid": (1, 0, 3)}), ids=("batch", "tokens"))
def test_empty(op, name, backend, empty):
    """No samples, or no tokens: the definition's shapes, and sums over nothing are 0."""
    inputs = arguments(op, name, Sizes(device=SIZES.device, **empty))
    want = run(call(op, "torch"), inputs, forward(op).differentiable)
    assert_equal_results(results(op, backend, inputs), want)


@every_call
def test_mixed_dtypes(op, name, backend):
    """Each tensor alone in another dtype: accurate where the definition takes it, else the same
    error. Then those that must share a dtype together, beside the others.

    In Triton's interpreter only a model's calls have each alone. The other ones have a run for each
    binary digit of the tensors' numbers: everyone is in one, and no two are in the same ones."""
    example = arguments(op, name)
    half = {key: x.half() for key, x in example.items() if is_float(x)}
    shared, free = {}, {}
    for key, x in half.items():
        try:
            call(op, "torch")(**example | {key: x})
        except TypeError as error:
            raises(type(error), "must have the dtype", call(op, backend), example | {key: x})
            shared[key] = x
        else:
            free[key] = x
    runs = [{key: x} for key, x in free.items()]
    if backend == "triton" and name != FIRST[op]:
        numbers, digits = list(enumerate(free.items(), 1)), range(len(free).bit_length())
        runs = [{key: x for i, (key, x) in numbers if i >> digit & 1} for digit in digits]
    for changed in runs:
        inputs, label = example | changed, ", ".join(changed)
        assert_as_definition(results(op, backend, inputs), inputs, op, backend, label)
    if shared:  # kernels keep results for the gradient in the dtype of the results
        inputs, label = example | shared, ", ".join(shared)
        low = cast(inputs, torch.float16)
        assert_as_definition(results(op, backend, inputs), inputs, op, backend, label, low)


@every_registration
def test_autocast_changes_nothing(op, name, backend):
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(op, backend, arguments(op, name))
    assert_equal_results(found, expected(op, name, backend))


@every_call
def test_float64_is_refused(op, name, backend):
    inputs = cast(arguments(op, name), torch.float64)
    raises(TypeError, "takes no float64", call(op, backend), inputs)


def registered_calls(op, name, backend):
    wrt = forward(op).differentiable
    with Calls(with_gradient=bool(wrt)) as calls:
        results(op, backend, arguments(op, name))
    assert len(calls.made) == (2 if wrt else 1)
    return calls.made


@every_quick_call
def test_kernels_keep_to_their_declarations(op, name, backend):
    """The first half of opcheck: no aliases, no input changed, results as the fake has them."""
    for overload, args in registered_calls(op, name, backend):
        torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


@every_registration
def test_registrations_pass_opcheck(op, name, backend):
    """The second half: derivatives, and AOTAutograd's graphs, in which a backend is a word that
    nothing looks at: one is enough."""
    utils = ["test_autograd_registration"]
    utils += ["test_aot_dispatch_dynamic"] * (backend == NATIVE[0])
    made = registered_calls(op, name, backend)
    for overload, args in made:
        torch.library.opcheck(overload, args, test_utils=utils)
    if len(made) == 2:  # a gradient of statistics, counts and the like would be silently dropped
        outs = made[0][0](*made[0][1])
        outs = outs if isinstance(outs, tuple) else (outs,)
        taken = {argument.name for argument in made[1][0]._schema.arguments}
        for key, x in zip(forward(op, name).outputs, outs, strict=True):
            assert x.requires_grad == (f"d{key}" in taken), key


@every_registration
def test_one_graph_serves_all_sizes(op, name, backend):
    inputs = [arguments(op, name, sizes) for sizes in COMPILED]
    assert_compiles(call(op, backend), *inputs, wrt=forward(op).differentiable)


@every_registration
def test_copies_and_pickles(op, name, backend):
    """Copies and pickles of what holds an op, such as a model, compute the same."""
    module = torch.nn.Module()
    module.op, module.kernel = call(op, backend), forward(op, name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.kernel is module.kernel
        found = results(op, backend, arguments(op, name), other.op)
        assert_equal_results(found, expected(op, name, backend))


@every_registration
def test_flops_are_those_of_the_definition(op, name, backend):
    """Forward and backward, as torch.utils.flop_counter counts them."""
    counts, wrt = {}, forward(op).differentiable
    for each in (backend, "torch"):
        with FlopCounterMode(display=False) as counter:
            run(call(op, each), arguments(op, name), wrt)
        counts[each] = counter.get_total_flops()
    assert counts[backend] == counts["torch"]
    assert (counts["torch"] > 0) == (op == "gqa_attention")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learned", (False, True))
def test_a_call_is_dispatched_where_something_asks_for_it(backend, learned):
    """Elsewhere it is not, for the host's sake."""
    x = torch.randn(2, 8, device=DEVICE)
    a = x.clone().requires_grad_(learned)
    with torch.profiler.profile() as profile:
        out = swiglu(a, x, backend=backend)
    names = {event.name for event in profile.events()}
    assert "lumina_kernels::swiglu_fwd" in names
    assert out.requires_grad == learned
    negative = torch._neg_view(x)  # -x for who reads it, x in memory
    assert torch.equal(swiglu(a, negative, backend=backend), -out)
    with Calls() as calls, torch.no_grad():
        swiglu(a, x, backend=backend)
    assert len(calls.made) == 1
