"""Training on several processes: the same outputs and gradients as on one."""

import copy
import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import IMAGE, cast, config, inputs, randomise
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from lumina import NextDiT, sample
from lumina.models.next_dit.block import TransformerBlock

WORLD = 2


def sharded(model):
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


FSDP1 = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP2 by block": sharded,
    "FSDP2": fully_shard,
    "FSDP1": FSDP1,
    "FSDP1 by block": functools.partial(
        FSDP1, auto_wrap_policy=ModuleWrapPolicy({TransformerBlock})
    ),
    "FSDP1 of original parameters": functools.partial(FSDP1, use_orig_params=True),
}


def network():
    torch.manual_seed(0)
    return randomise(NextDiT(config(dim=48)), torch.float32).float()


def train(model, arguments):
    """Pictures between two steps, and the velocity after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, _, feats, mask = arguments
    results = []
    for _ in range(2):
        model(*arguments).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        run = sample(model, feats, mask, feats, mask, size=IMAGE[1:], latents=x, steps=1)
        results.append(run.latents)
    with torch.no_grad():
        return torch.stack([*results, model(*arguments)])


def worker(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    torch.set_num_threads(1)
    try:
        torch.manual_seed(1)
        arguments = cast(inputs(*IMAGE), torch.float32)
        for name, wrap in WRAPPERS.items():
            expected = train(network(), arguments)
            out = train(wrap(network()), arguments)  # all processes have the same batch
            torch.testing.assert_close(
                out, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert (expected[2] - network()(*arguments)).abs().max() > 1e-2, name  # it trained
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_wrapped_networks_train_and_draw_as_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # gloo, on the CPU
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=WORLD)


def test_every_parameter_has_a_gradient():
    """DDP waits for all of them; that of `pad_token` is 0."""
    model = network()
    model(*cast(inputs(*IMAGE), torch.float32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.pad_token.grad.any()
    without = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert set(without) <= {"pad_token", *(n for n in without if "ky_norm.bias" in n)}
    assert copy.deepcopy(model).pad_token.requires_grad
