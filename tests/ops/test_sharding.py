"""DTensor's rules: a call on tensors that two processes share gives what the whole call gives."""

import pytest
import torch
import torch.distributed as dist
from common import CPU_LEVELS, is_float
from contract import forward
from torch import multiprocessing
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import lumina_kernels
from lumina_kernels.examples import Sizes, examples
from lumina_kernels.ops import OPS
from lumina_kernels.sharding import letters_of as letters_of_tensor

SIZES = Sizes(B=4, grid=(1, 4, 4))
pytestmark = pytest.mark.skipif(not CPU_LEVELS, reason="the C++ kernels are not built")


def calls(op):
    """The examples; for one op also calls whose tensors differ in nothing but their names, so that
    a decision that DTensor kept for one of them would be wrong for the next."""
    torch.manual_seed(0)
    found = examples(op, SIZES)
    if op in ("rope3d", "rope_table", "gqa_attention"):  # one head of keys cannot be split
        one = examples(op, Sizes(B=4, grid=(1, 4, 4), G=1))
        found |= {f"{name} G=1": inputs for name, inputs in one.items()}
    if op == "norm_modulate":
        x, scale = found["rms"]["x"], found["rms"]["scale"]
        found |= {name: {"x": x, name: scale} for name in ("scale", "shift")}
        found |= {name: {"x": x, name: x[0, 0].clone()} for name in ("weight", "bias")}
    return found


def letters_of(op):
    over = forward(op).over
    return ("0", "1", "2") if over == "..." else tuple(over.split())


CASES = [(op, name, letter) for op in OPS for name in calls(op) for letter in letters_of(op)]


def dimension(hint, shape, letter):
    """Which dimension of a tensor has this letter; None where none has."""
    return letters_of_tensor(hint, shape).get(letter, (None,))[0]


def results(op, inputs):
    """Outputs, gradients of the inputs, and where the outputs are."""
    outs = getattr(lumina_kernels, op)(**inputs, backend="cpu")
    outs = outs if isinstance(outs, tuple) else (outs,)
    values = {f"out {i}": x.detach() for i, x in enumerate(outs) if x is not None}
    placements = {n: x.placements[0] for n, x in values.items() if isinstance(x, DTensor)}
    losses = [_weighted(x).sum() for x in outs if x is not None and x.requires_grad]
    if losses:
        sum(losses).backward()
        values |= {f"d{n}": x.grad for n, x in inputs.items() if is_float(x) and x.requires_grad}
    full = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in values.items()}
    return full, placements


def _weighted(x):
    """Unequal gradients along every dimension, the same whole or in parts."""
    return (x * x.detach().sin()).float()


def main(rank, folder):
    """One of the two processes; the first one saves what it found for every case."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for op, name, letter in CASES:
        inputs, declared = calls(op)[name], forward(op, name)

        def leaf(key, x, place, declared=declared):
            if not isinstance(x, torch.Tensor):
                return x
            x = place(key, x) if key in declared.inputs else x
            return x.detach().requires_grad_(key in declared.differentiable)

        def shard(key, x, declared=declared, letter=letter):
            n = dimension(declared.inputs[key], x.shape, letter)
            return distribute_tensor(x, mesh, [Replicate() if n is None else Shard(n)])

        try:
            whole, sharded = (
                results(op, {key: leaf(key, x, place) for key, x in inputs.items()})
                for place in (lambda key, x: x.clone(), shard)
            )
            found[op, name, letter] = (whole[0], *sharded)
        except Exception as error:  # reported by the test of that case
            found[op, name, letter] = repr(error)
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    multiprocessing.spawn(main, (str(folder),), nprocs=2)
    return torch.load(folder / "found", weights_only=False)


@pytest.mark.parametrize("op, name, letter", CASES)
def test_sharded_is_whole(found, op, name, letter):
    assert not isinstance(found[op, name, letter], str), found[op, name, letter]
    whole, sharded, placements = found[op, name, letter]
    assert whole.keys() == sharded.keys()
    for key, value in sharded.items():
        torch.testing.assert_close(value, whole[key], msg=lambda text, key=key: f"{key}: {text}")
    outputs = list(forward(op, name).outputs.values())
    for key, placement in placements.items():
        n = dimension(outputs[int(key.removeprefix("out "))], whole[key].shape, letter)
        whole_here = n is None or ("G=1" in name and letter == "H" and "no k" not in name)
        assert placement == (Replicate() if whole_here else Shard(n)), key
    split = any(placement.is_shard() for placement in placements.values())
    assert split != ("G=1" in name and letter == "H" and "no k" not in name)
